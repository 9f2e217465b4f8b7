"""The bundle: one ONNX file that maps noise to pixels, with a card that says what it is.

This module owns the schema. A file is checked here, as plain data, before any runtime sees it: it must be
self-contained (external data has been a way to read other files), use ONNX's own operators only, and have
exactly the input, output and card below.

    input   noise   float32 [batch, noise_size], standard normal
    output  images  uint8   [batch, height, width, channels]
    output  latents float32 [batch, latent_size], where it was exported so
    metadata_props  balancedvae.schema, balancedvae.card (JSON)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from serve.errors import BundleError
from serve.stubs.onnx.v1 import model_pb2 as onnx

SCHEMA = 1
SCHEMA_KEY = "balancedvae.schema"
CARD_KEY = "balancedvae.card"
EMBEDDED = {  # the same faces in two precisions
    "fp32": Path(__file__).parent / "bundles" / "faces.onnx",
    "int8": Path(__file__).parent / "bundles" / "faces-int8.onnx",
}
DEFAULT = EMBEDDED["fp32"]
MOST_BYTES = 2**31 - 1  # protobuf's own limit
FLOAT, UINT8 = 1, 2  # ONNX's element types
EXTERNAL = 1  # ONNX's data location


@dataclass(frozen=True)
class Card:
    """What a bundle is and where it comes from.

    Attributes:
        name: What the model is served as: letters, digits, '-', '_' and '.'.
        image_shape: Height, width, channels.
        noise_size: Values of noise a sample.
        latent_size: Values of the first stage's latent.
        prior: What maps noise to latents: "second-stage", or "normal" where the noise is the latent.
        normalisation: Mode of the latent normalisation and how it was fitted.
        precision: What the graph computes in: "fp32"; "fp16", pictures in float16; "int8", layers in 8 bits.
        recipe: The training recipe as run.
        dataset: What it was trained on: count, digest, and as far as told name and licence.
        licence: Under what terms the weights may be used.
        notes: Anything a user should know, in prose.
        metrics: Measurements, each with its protocol.
        store: What float weights are stored in: "float32" or "float16".
        difference: Of a precision's samples from fp32's: grey levels, distances, and over how many samples.
        verification: What was checked of the file before it was written, and what came out.
        producers: Versions of what made the file.
    """

    name: str
    image_shape: tuple[int, int, int]
    noise_size: int
    latent_size: int
    prior: str
    normalisation: dict[str, Any]
    precision: str
    recipe: dict[str, Any]
    dataset: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    notes: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    producers: dict[str, str] = field(default_factory=dict)
    store: str = "float32"
    difference: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the card as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Return the card that `to_json` wrote; fields added by later versions are dropped.

        Raises:
            BundleError: no card, or one that lacks a field.
        """
        try:
            values = json.loads(text)
            known = {each.name for each in dataclasses.fields(cls)}
            card = cls(**{key: value for key, value in values.items() if key in known})
            height, width, channels = (int(side) for side in card.image_shape)
        except (ValueError, TypeError, AttributeError) as error:
            raise BundleError(f"the model's card cannot be read: {error}; export it again") from None
        return dataclasses.replace(card, image_shape=(height, width, channels))

    def metadata(self) -> dict[str, str]:
        """Return the metadata_props of a bundle with this card."""
        return {SCHEMA_KEY: str(SCHEMA), CARD_KEY: self.to_json()}


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
        if path.stat().st_size > MOST_BYTES:
            raise BundleError(f"{path} is over 2 GiB; a bundle is one ONNX file below that")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read the model {path}: {error.strerror}") from None
    try:
        card = check(data)
    except BundleError as error:
        raise BundleError(f"{path} is not a model of ours: {error}") from None
    return Bundle(data, card, hashlib.sha256(data).hexdigest())


def check(data: bytes) -> Card:
    """Return the card of a bundle's bytes.

    Raises:
        BundleError: which rule of the schema they break.
    """
    try:
        model = onnx.Model.FromString(data)
    except DecodeError:
        raise BundleError("it is not an ONNX file") from None
    if not model.ir_version or not model.graph.node:
        raise BundleError("it is not an ONNX file")
    _check_contained(model)
    properties = {each.key: each.value for each in model.metadata_props}
    if SCHEMA_KEY not in properties:
        raise BundleError("it has no card; make models with export-onnx")
    if properties[SCHEMA_KEY] != str(SCHEMA):
        schema = properties[SCHEMA_KEY][:20]
        raise BundleError(f"its schema is {schema} and this version reads {SCHEMA}; export it again, or upgrade")
    card = Card.from_json(properties.get(CARD_KEY, ""))
    _check_values("input", model.graph.input, [("noise", FLOAT, (card.noise_size,))])
    images, latents = ("images", UINT8, card.image_shape), ("latents", FLOAT, (card.latent_size,))
    _check_values("output", model.graph.output, [images, latents][: max(1, len(model.graph.output))])
    return card


def _check_contained(model: onnx.Model) -> None:
    """Refuse whatever reaches outside the file or beyond ONNX's own operators."""
    if model.functions or model.graph.sparse_initializer:
        raise BundleError("it holds local functions or sparse weights, which a bundle never does")
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise BundleError(f"it uses the custom operator {node.domain}:{node.op_type}; only ONNX's own run")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise BundleError(f"it holds a nested graph (in {node.op_type}), which a bundle never does")
            tensors += [attribute.t, *attribute.tensors]
    if any(tensor.data_location == EXTERNAL or tensor.external_data for tensor in tensors):
        raise BundleError("it keeps weights in other files (external data); a bundle is one file")


def _check_values(kind: str, values: Any, wanted: list[tuple[str, int, tuple[int, ...]]]) -> None:
    text = " and ".join(f"{name} [batch, {', '.join(map(str, shape))}]" for name, _, shape in wanted)
    if [value.name for value in values] != [name for name, _, _ in wanted]:
        raise BundleError(f"its {kind} should be {text}. Received: {[value.name for value in values]}")
    for value, (_, element, shape) in zip(values, wanted, strict=True):
        tensor = value.type.tensor_type
        sizes = tuple(dimension.dim_value for dimension in tensor.shape.dim)
        if tensor.elem_type != element or sizes[1:] != tuple(shape) or sizes[0] != 0:
            received = f"shape {list(sizes)}, element type {tensor.elem_type}"
            raise BundleError(f"its {kind} should be {text}. Received: {received}")
