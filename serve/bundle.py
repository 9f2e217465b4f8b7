"""The bundle: one ONNX file that maps noise to pixels, with a card that says what it is.

This module owns the schema. A file is checked here, as plain data, before any runtime sees it: it must be
self-contained (external data has been a way to read other files), hold nothing that `serve.graph` does not know,
and have exactly the input, output and card below.

    input   noise   float32 [batch, noise_size], standard normal
    output  images  uint8   [batch, height, width, channels]
    output  latents float32 [batch, latent_size], where it was exported so
    metadata_props  balancedvae.schema, balancedvae.card (JSON)
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

from serve.card import Card
from serve.errors import BundleError
from serve.graph import FLOAT, UINT8, read
from serve.text import one_line, quoted

SCHEMA = 1
SCHEMA_KEY = "balancedvae.schema"
CARD_KEY = "balancedvae.card"
EMBEDDED = {  # the same faces in two precisions
    "fp32": Path(__file__).parent / "bundles" / "faces.onnx",
    "int8": Path(__file__).parent / "bundles" / "faces-int8.onnx",
}
DEFAULT = EMBEDDED["fp32"]
MOST_BYTES = 2**31 - 1  # protobuf's own limit


def metadata(card: Card) -> dict[str, str]:
    """Return the metadata_props of a bundle with this card."""
    return {SCHEMA_KEY: str(SCHEMA), CARD_KEY: card.to_json()}


@dataclass(frozen=True)
class Bundle:
    """A checked model file.

    Attributes:
        data: The file's bytes.
        card: What it says of itself.
        digest: SHA-256 of the bytes, hexadecimal: the model's identity.
    """

    data: bytes = field(repr=False)
    card: Card
    digest: str


def load(path: Path | str = DEFAULT) -> Bundle:
    """Read and check a bundle; the embedded faces model by default.

    Raises:
        BundleError: the file is missing or not a bundle.
    """
    path = Path(path)
    try:
        data = _read(path)
        try:
            return parse(data)
        except BundleError as error:
            raise BundleError(f"{path} is not a model of ours: {error}") from None
    except (OSError, ValueError) as error:  # the second, of a path that no file can have
        raise BundleError(f"cannot read the model {path}: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise BundleError(f"there is not enough memory for the model {path}") from None


def parse(data: bytes) -> Bundle:
    """Return the bundle of a model file's bytes.

    Raises:
        BundleError: as `check`.
    """
    return Bundle(data, check(data), hashlib.sha256(data).hexdigest())


def check(data: bytes) -> Card:
    """Return the card of a bundle's bytes.

    Raises:
        BundleError: which rule of the schema they break.
    """
    model = read(data)
    properties = {each.key: each.value for each in model.metadata_props}
    if SCHEMA_KEY not in properties:
        raise BundleError("it has no card; make models with export-onnx")
    schema = properties[SCHEMA_KEY]
    if schema != str(SCHEMA):
        found = one_line(schema, 40)
        raise BundleError(f"its schema is {found} and this version reads {SCHEMA}; export it again, or upgrade")
    card = Card.from_json(properties.get(CARD_KEY, ""))
    _check_values("input", model.graph.input, [("noise", FLOAT, (card.noise_size,))])
    images, latents = ("images", UINT8, card.image_shape), ("latents", FLOAT, (card.latent_size,))
    _check_values("output", model.graph.output, [images, latents][: max(1, len(model.graph.output))])
    return card


def _read(path: Path) -> bytes:
    """Return a regular file's bytes. Whatever else has a name - a pipe, a device - is not even opened."""
    _check_regular(path, path.stat())
    # It may have become a pipe meanwhile, and opening one may wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        stat = os.fstat(file.fileno())
        _check_regular(path, stat)
        return file.read(stat.st_size)


def _check_regular(path: Path, stat: os.stat_result) -> None:
    if not S_ISREG(stat.st_mode):
        raise BundleError(f"{path} is not a regular file; a bundle is one ONNX file")
    if stat.st_size > MOST_BYTES:
        raise BundleError(f"{path} is over 2 GiB; a bundle is one ONNX file below that")


def _check_values(kind: str, values: Any, wanted: list[tuple[str, int, tuple[int, ...]]]) -> None:
    text = " and ".join(f"{name} [batch, {', '.join(map(str, shape))}]" for name, _, shape in wanted)
    names = [value.name for value in values]
    if names != [name for name, _, _ in wanted]:
        raise BundleError(f"its {kind} should be {text}. Received: {quoted(names)}")
    for value, (_, element, shape) in zip(values, wanted, strict=True):
        tensor = value.type.tensor_type
        sizes = [dimension.dim_value for dimension in tensor.shape.dim]
        if tensor.elem_type != element or sizes != [0, *shape]:
            received = f"shape {quoted(sizes)}, element type {tensor.elem_type}"
            raise BundleError(f"its {kind} should be {text}. Received: {received}")
