"""What is served: models by name and version, put in and taken out while requests run.

A request that names no version gets the highest. Whoever holds a model may finish with it: what is replaced ends
once its last request is done.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten

import numpy as np

from serve.errors import SettingsError
from serve.noise import Noise, draw
from serve.server import memory
from serve.server.batcher import Batcher
from serve.server.refusal import Code, Refusal
from serve.server.work import Backend, BatchObserver, Budget
from serve.text import quoted

MESSAGE_BYTES = 4 * 2**20 - 2**16  # what a client with gRPC's defaults takes, less room for the rest
FILE_BYTES = 1024  # that a file has beside its pixels, at most; and these may take a quarter more than they are
MOST_NAMES = 500  # characters of names in a message
CHUNK_BYTES = 2**19  # of a stream's messages: batches up to this, or one that is larger,
CHUNK_MOST = 2**20  # within this


@dataclass(frozen=True)
class Limits:
    """What one request for a model may hold.

    Attributes:
        count: Samples in a message, raw.
        files: Samples in a message, as files.
        chunk: Samples in a stream's message.
        ahead: Chunks of a stream that may be computed before they are read.
    """

    count: int
    files: int
    chunk: int
    ahead: int

    @classmethod
    def of(cls, batch: int, sample_bytes: int) -> Limits:
        """Return the limits for a batch size and pictures of so many bytes."""
        batches = max(1, CHUNK_BYTES // (batch * sample_bytes))
        chunk = max(1, min(batch * batches, CHUNK_MOST // sample_bytes))
        # While one chunk is sent, a whole batch can be computed.
        count, files = MESSAGE_BYTES // sample_bytes, MESSAGE_BYTES // (sample_bytes * 5 // 4 + FILE_BYTES)
        return cls(max(1, count), max(1, files), chunk, 1 + math.ceil(batch / chunk))

    def within(self, budget: Budget, sample_bytes: int) -> Limits:
        """Return the limits where no request may hold more than a server's budget.

        Raises:
            SettingsError: one stream does.
        """
        stream = self.chunk * self.ahead
        size = math.ceil(stream * sample_bytes / 2**20)
        for option, have, need in (
            ("--queue-samples", budget.samples, stream),
            ("--queue-bytes", budget.bytes >> 20, size),
        ):
            if have < need:
                holds = f"one stream of pictures of {sample_bytes:,} bytes holds {stream} samples, {size} MiB"
                raise SettingsError(f"{option} {have} is too small: {holds}; pass {option} {need} or more")
        most = min(budget.samples, budget.bytes // sample_bytes)
        return replace(self, count=min(self.count, most), files=min(self.files, most))


class Model:
    """A version of a model, being served. Make it on a running event loop.

    Args:
        engines: One a device.
        name: What it is served as.
        version: A whole number.
        file: What it was loaded from, where callers may have it.
        budget: Shared by all models.
        delay: Seconds that a batch which is not full may wait.
        observer: Takes note of each batch.
        changed: Called when it begins or ceases to work.

    Raises:
        SettingsError: a stream of it does not fit into the budget.
    """

    def __init__(
        self,
        engines: Sequence[Backend],
        name: str,
        version: int,
        file: bytes | None,
        budget: Budget,
        delay: float,
        observer: BatchObserver,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.card = engines[0].card
        self.digest = engines[0].digest
        self.arithmetic = engines[0].arithmetic
        self.devices = [engine.device for engine in engines]
        self.name, self.version, self.file = name, version, file
        self.batch = engines[0].batch
        sample_bytes = math.prod(self.card.image_shape)
        self.limits = Limits.of(self.batch, sample_bytes).within(budget, sample_bytes)
        probe = draw(0, 0, max(engine.batch for engine in engines), self.card.noise_size)
        self.batcher = Batcher(engines, budget, sample_bytes, delay, observer, probe, changed)

    @property
    def on_card(self) -> str:
        """Where the card has another name than the file: a remark on it, for whoever reads what is served."""
        return "" if self.card.name == self.name else f", called {self.card.name} on its card"

    @property
    def working(self) -> bool:
        """Whether it makes pictures: a device that fails takes it away until it works again."""
        return self.batcher.working

    def noise(self, seed: int, start: int, temperature: float) -> Callable[[int, int], Noise]:
        """Return what draws a range's noise, by offset and count."""
        scale = np.float32(temperature)
        return lambda offset, count: draw(seed, start + offset, count, self.card.noise_size) * scale


class Registry:
    """The models that a server has now.

    The event loop changes it, by putting another table in the place of the one before; any thread may read.

    Args:
        changed: Called whenever a model came or went.

    Attributes:
        loading: Whether the server is only starting, so that what it lacks may be still to come.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.loading = False
        self._models: Mapping[str, Mapping[int, Model]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self.changed = changed

    def __len__(self) -> int:
        return sum(map(len, self._models.values()))

    @property
    def working(self) -> bool:
        """Whether any model makes pictures."""
        return any(model.working for versions in self._models.values() for model in versions.values())

    def models(self, name: str = "") -> list[Model]:
        """Return all models, or all versions of one, by name and falling version.

        Raises:
            Refusal: NOT_FOUND, no model of that name.
        """
        table = {name: self._named(name)} if name else self._models
        return [versions[number] for _, versions in sorted(table.items()) for number in sorted(versions, reverse=True)]

    def get(self, name: str, version: str = "") -> Model:
        """Return a model by name (empty: the only one) and version or digest (empty: the highest version).

        Raises:
            Refusal: NOT_FOUND; UNAVAILABLE while there is no model at all, or that one may be still to come.
        """
        versions = self._named(name)
        if not version:
            return versions[max(versions)]
        found = [model for model in versions.values() if version in (str(model.version), model.digest)]
        if not found:
            have = shorten(", ".join(map(str, sorted(versions))), MOST_NAMES, placeholder=" ...")
            received = quoted(version)
            raise self._lacking(f"version must be one of {have}, or one's digest. Received: {received}")
        return found[0]

    def of_digest(self, digest: str, arithmetic: str = "") -> Model:
        """Return a model by its digest, and, where that is named, its arithmetic.

        Raises:
            Refusal: NOT_FOUND; UNAVAILABLE while there is no model at all, or that one may be still to come.
        """
        models = self.models()
        if not models:
            raise _none_yet()
        found = [model for model in models if model.digest == digest and arithmetic in ("", model.arithmetic)]
        if not found:
            raise self._lacking(f"no model here has this digest and arithmetic. Received: {quoted(digest)}")
        return found[0]

    def put(self, model: Model) -> None:
        """Serve a model from now on; one of the same name and version ends when its requests are done."""
        versions = self._models.get(model.name, {})
        self._models = {**self._models, model.name: {**versions, model.version: model}}
        if before := versions.get(model.version):
            self._retire(before)
        self.changed()

    def drop(self, model: Model) -> None:
        """Serve a model no longer, once its requests are done."""
        versions = self._models.get(model.name, {})
        if versions.get(model.version) is model:
            left = {number: each for number, each in versions.items() if each is not model}
            others = {name: each for name, each in self._models.items() if name != model.name}
            self._models = {**others, model.name: left} if left else others
            self._retire(model)
            self.changed()

    async def close(self) -> None:
        """Drop every model, and wait until all requests are done."""
        for model in self.models():
            self.drop(model)
        await asyncio.gather(*self._retiring)

    def _named(self, name: str) -> Mapping[int, Model]:
        models = self._models
        if not models:
            raise _none_yet()
        if not name and len(models) == 1 and not self.loading:
            return next(iter(models.values()))
        if name not in models:
            have = shorten(", ".join(sorted(models)), MOST_NAMES, placeholder=" ...")
            raise self._lacking(f"model must be one of {have}. Received: {quoted(name)}")
        return models[name]

    def _lacking(self, what: str) -> Refusal:
        return _none_yet("not all models are ready yet") if self.loading else Refusal(Code.NOT_FOUND, what)

    def _retire(self, model: Model) -> None:
        task = asyncio.get_running_loop().create_task(model.batcher.close())
        self._retiring.add(task)
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._retiring.discard(task)
        memory.give_back()


def _none_yet(what: str = "no model is ready yet") -> Refusal:
    return Refusal(Code.UNAVAILABLE, f"{what}; repeat in a moment", 0.25)
