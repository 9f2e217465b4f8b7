"""What both clients share: a connection, a model, and the messages between them."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from serve.address import check_address
from serve.card import Card
from serve.client.options import Options
from serve.errors import Broken, BundleError, Changed, Rejected
from serve.model import EXACT, Images, as_noise, check_sampling
from serve.stubs.sampling.v1 import sampling_pb2 as wire

Encoding = Literal["png", "jpeg", "webp"]
Priority = Literal["interactive", "bulk"]
Event = TypeVar("Event", threading.Event, asyncio.Event)

ENCODINGS = {"raw": wire.ENCODING_RAW, "png": wire.ENCODING_PNG, "jpeg": wire.ENCODING_JPEG, "webp": wire.ENCODING_WEBP}
PRIORITIES = {"interactive": wire.PRIORITY_INTERACTIVE, "bulk": wire.PRIORITY_BULK}
MOST_NAMES = 500  # characters of names in a message
MESSAGE = (4 << 20) - (64 << 10)  # bytes of noise that any server takes in one, as gRPC's own default is 4 MiB


class Connection(Generic[Event]):
    """What a client of either kind knows of its server.

    Args:
        address: HOST:PORT, or unix:PATH.
        options: Token, TLS, patience.
        closed: Set once the client is closed.

    Raises:
        Rejected: it is no address.
    """

    def __init__(self, address: str, options: Options, closed: Event) -> None:
        try:
            self.address = check_address(address)
        except ValueError as error:
            raise Rejected(f"a server's address is {error}") from None
        self.options = options
        self.met = False  # whether it ever answered
        self._closed: Event = closed

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def more(self, timeout: float | None) -> dict[str, Any]:
        """Return what every call is made with."""
        return {"timeout": timeout, "metadata": self.options.metadata}


class Served:
    """What a client knows of a model, and the messages that ask for its samples.

    Raises:
        Broken: the server's description of it cannot be read.

    Attributes:
        name: What it is served as.
        version: A whole number, as text.
        card: What it says of itself.
        digest: SHA-256 of the model file. Every request names it, so that no other model can answer.
        arithmetic: What the server computes in; another server's answer in another one is refused.
        batch: The most samples that the server puts into one message.
    """

    def __init__(self, model: wire.Model) -> None:
        self.name = model.name
        self.version = model.version
        try:
            self.card = Card.from_json(model.card)
        except BundleError as error:
            raise Broken(f"the server describes {self.name} in words that this version cannot read: {error}") from None
        self.digest = model.digest
        self.arithmetic = model.arithmetic or EXACT
        self.batch = model.max_count

    def _range(
        self,
        seed: int,
        start: int,
        count: int,
        temperature: float,
        priority: Priority | None,
        encoding: str = "raw",
    ) -> wire.Range:
        with _rejecting():
            check_sampling(seed, start, count, temperature)
        return wire.Range(
            model=self.name,
            version=self.digest,
            seed=seed,
            start=start,
            count=count,
            temperature=temperature,
            encoding=_among(ENCODINGS, encoding),
            priority=_among(PRIORITIES, priority) if priority else wire.PRIORITY_UNSPECIFIED,
        )

    def _requests(self, noise: npt.ArrayLike, priority: Priority | None) -> list[tuple[wire.DecodeRequest, int]]:
        """Return what asks for the images of noise, and for how many each: what it and its answer hold."""
        with _rejecting():
            values = as_noise(noise, self.card.noise_size).astype("<f4", copy=False)
        rank = _among(PRIORITIES, priority) if priority else wire.PRIORITY_UNSPECIFIED
        step = max(1, min(self.batch, MESSAGE // (4 * self.card.noise_size)))
        parts = [values[at : at + step] for at in range(0, len(values), step)]
        return [
            (wire.DecodeRequest(model=self.name, version=self.digest, noise=part.tobytes(), priority=rank), len(part))
            for part in parts
        ]

    def _joined(self, parts: Sequence[Images]) -> Images:
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, *self.card.image_shape), np.uint8), *parts])

    def _images(self, chunk: wire.Chunk, count: int) -> Images:
        self._check(chunk)
        sent, shape = (chunk.count, chunk.height, chunk.width, chunk.channels), (count, *self.card.image_shape)
        if sent != shape or len(chunk.pixels) != math.prod(shape):
            raise Broken(
                f"the server should send pictures of the shape {list(shape)}. Received: {list(sent)}, in "
                f"{len(chunk.pixels)} bytes; is it serve-vae?"
            )
        return np.frombuffer(chunk.pixels, np.uint8).reshape(shape)

    def _files(self, chunk: wire.Chunk) -> list[tuple[int, bytes]]:
        self._check(chunk)
        if len(chunk.files) != chunk.count:
            raise Broken(f"the server sent {len(chunk.files)} files for {chunk.count} samples")
        return list(enumerate(chunk.files, chunk.start))

    def _check(self, chunk: wire.Chunk) -> None:
        if chunk.digest != self.digest:  # a server of before versions had digests
            raise self.changed()
        arithmetic = chunk.arithmetic or EXACT
        if arithmetic != self.arithmetic:
            raise Changed(
                f"the server computes {self.name} in {arithmetic} arithmetic, where {self.arithmetic} was begun with; "
                "run the command again, or address servers of one arithmetic"
            )

    def changed(self) -> Changed:
        """Return the error for a server that has another model now."""
        return Changed(f"the server changed the model {self.name} meanwhile; run the command again")


@contextmanager
def _rejecting() -> Iterator[None]:
    """Raise what a check of arguments says as the client's own error."""
    try:
        yield
    except ValueError as error:
        raise Rejected(str(error)) from None


def _among(words: dict[str, Any], word: str) -> Any:
    if word not in words:
        raise Rejected(
            f"encoding and priority must be among {', '.join((*ENCODINGS, *PRIORITIES))}. Received: {word!r}"
        )
    return words[word]


def choose(address: str, models: Sequence[wire.Model], name: str, version: str) -> wire.Model:
    """Return the model called `name`, or the only one of that version; the newest version where none is asked for.

    Raises:
        Rejected: no model has that name and version, or there are several and none is named.
    """
    named = [model for model in models if name in ("", model.name) and version in ("", model.version, model.digest)]
    if len({model.name for model in named}) == 1:
        return max(named, key=lambda model: int(model.version or 1))
    have = shorten(", ".join(f"{model.name}@{model.version}" for model in models), MOST_NAMES, placeholder=" ...")
    asked = f"{name}@{version}" if version else name
    what = f"no model {asked!r}" if asked and not named else "several models"
    raise Rejected(f"the server at {address} has {what}; choose one with --model: {have}")
