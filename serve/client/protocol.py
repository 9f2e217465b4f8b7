"""What both clients share: connections, messages, errors, and when to ask again."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from serve.card import Card
from serve.client.options import Options
from serve.errors import (
    Broken,
    BundleError,
    Changed,
    Closed,
    Denied,
    Overloaded,
    Rejected,
    RemoteError,
    ServeError,
    TimedOut,
    Unreachable,
)
from serve.model import Images, as_noise, check_sampling
from serve.stubs.sampling.v1 import sampling_pb2 as wire

Encoding = Literal["png", "jpeg", "webp"]
Priority = Literal["interactive", "bulk"]
Event = TypeVar("Event", threading.Event, asyncio.Event)

Code = grpc.StatusCode
ENCODINGS = {"raw": wire.ENCODING_RAW, "png": wire.ENCODING_PNG, "jpeg": wire.ENCODING_JPEG, "webp": wire.ENCODING_WEBP}
PRIORITIES = {"interactive": wire.PRIORITY_INTERACTIVE, "bulk": wire.PRIORITY_BULK}
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds
KINDS: dict[grpc.StatusCode, type[RemoteError]] = {
    Code.INVALID_ARGUMENT: Rejected,
    Code.NOT_FOUND: Rejected,
    Code.OUT_OF_RANGE: Rejected,
    Code.FAILED_PRECONDITION: Rejected,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.UNAUTHENTICATED: Denied,
    Code.PERMISSION_DENIED: Denied,
}


class Connection(Generic[Event]):
    """What a client of either kind knows of its server.

    Args:
        address: HOST:PORT, or unix:PATH.
        options: Token, TLS, patience.
        closed: Set once the client is closed.
    """

    def __init__(self, address: str, options: Options, closed: Event) -> None:
        self.address = address
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


class Tries:
    """The tries of one call: which failures are worth another try, and when.

    `with tries:` goes around each. A failure that may be mended by asking again ends the block without a word, and
    `pause` says how many seconds to wait; every other one is raised as a RemoteError.

    Args:
        connection: Whose call it is.
        model: The model it names, if any.
    """

    def __init__(self, connection: Connection[Any], model: Served | None = None) -> None:
        self.pause = 0.0
        self._connection = connection
        self._model = model
        # An address that never answered is more likely wrong than away for a while.
        self._seconds = connection.options.patience if connection.met else 0.0
        self.be_patient()

    def be_patient(self) -> None:
        """Begin to be patient anew: the server did something, or its reader comes back from doing so."""
        self._backoff = FIRST_PAUSE
        self._until = time.monotonic() + self._seconds

    def __enter__(self) -> None:
        self.pause = 0.0
        if self._connection.closed:
            raise self._was_closed()

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> bool:
        if failure is None:
            self._connection.met = True
            return False
        if not self._is_the_calls(failure):
            return False
        if self._connection.closed:
            raise self._was_closed() from None
        self.pause = self._before_another(failure)
        return True

    def _is_the_calls(self, failure: BaseException) -> bool:
        """Tell whether gRPC raised it, and not we or who called us."""
        if not self._connection.closed or isinstance(failure, ServeError):
            return isinstance(failure, grpc.RpcError)
        # Of a channel that is closed gRPC raises ValueErrors, UsageErrors and others; and in asyncio it cancels
        # what is under way, which nobody asked the task for.
        return isinstance(failure, Exception) or (isinstance(failure, asyncio.CancelledError) and not _told_to_stop())

    def _was_closed(self) -> Closed:
        return Closed(f"the client of {self._connection.address} is closed; make another one")

    def _before_another(self, failure: Any) -> float:
        """Return the seconds to wait after an RpcError.

        Raises:
            RemoteError: waiting does not help, or no longer.
        """
        if self._model and failure.code() is Code.NOT_FOUND:  # it was there before
            raise self._model.changed() from None
        seconds = _retry_delay(failure)
        if seconds is None and failure.code() in (Code.UNAVAILABLE, Code.CANCELLED):
            seconds = self._backoff
        if seconds is None or time.monotonic() + seconds > self._until:
            raise explain(self._connection.address, failure) from None
        self._backoff = min(2 * self._backoff, LONGEST_PAUSE)
        return seconds * random.uniform(1.0, 1.25)  # noqa: S311 (spreads clients, hides nothing)


class Streaming(Tries):
    """The tries of a stream, each of which asks for what has not come yet.

    Args:
        connection: Whose stream it is.
        model: The model it names.
        wanted: The samples it is for.

    Attributes:
        left: How many have not come.
    """

    def __init__(self, connection: Connection[Any], model: Served, wanted: wire.Range) -> None:
        super().__init__(connection, model)
        self._wanted = wanted
        self._count = self.left = wanted.count
        self._stop = wanted.start + wanted.count

    @property
    def request(self) -> wire.SampleStreamRequest:
        """What to ask for now."""
        self._wanted.start, self._wanted.count = self._stop - self.left, self.left
        return wire.SampleStreamRequest(range=self._wanted)

    def take(self, chunk: wire.Chunk) -> wire.Chunk:
        """Return the next chunk, counted.

        Raises:
            RemoteError: it is not the next one, or the client was closed meanwhile.
        """
        if self._connection.closed:  # gRPC may have had it before
            raise self._was_closed()
        if chunk.start != self._stop - self.left or not 1 <= chunk.count <= self.left:
            raise self._wrong(f"sent samples from {chunk.start}, {chunk.count} of them, as the next")
        self.left -= chunk.count
        self.be_patient()
        return chunk

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: object) -> bool:
        if failure is None and self.left:
            raise self._wrong("ended the stream")
        # Once all is here, it does not matter how the call ends.
        if failure is not None and not self.left and self._is_the_calls(failure):
            return True
        return super().__exit__(kind, failure, trace)

    def _wrong(self, did: str) -> Broken:
        missing = f"{self.left} of {self._count} samples from {self._stop - self._count} were missing"
        return Broken(f"the server at {self._connection.address} {did} when {missing}; is it serve-vae?")


def _told_to_stop() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _retry_delay(failure: Any) -> float | None:
    """Return what google.rpc.RetryInfo says, in seconds; None where it is not there."""
    try:
        status = rpc_status.from_call(failure)
    except ValueError:  # its code is not the call's: some proxy's work
        return None
    for detail in status.details if status else ():
        info = RetryInfo()
        if detail.Unpack(info):
            seconds: float = info.retry_delay.ToNanoseconds() / 1e9
            return max(FIRST_PAUSE, seconds)
    return None


def explain(address: str, failure: Any) -> RemoteError:
    """Return an RpcError as one line that says what to try."""
    code, details = failure.code(), (failure.details() or "").splitlines() or [""]
    if code is Code.UNAVAILABLE:
        return Unreachable(
            f"no server answers at {address}; start one with: serve-vae --listen {address} ({details[0][:200]})"
        )
    if code is Code.UNIMPLEMENTED:
        return Broken(f"what listens at {address} is not serve-vae; check --server")
    if code is Code.DEADLINE_EXCEEDED:
        return TimedOut(f"the server at {address} did not answer in time; is it serve-vae? Or allow a longer timeout")
    return KINDS.get(code, Broken)(f"the server at {address} answered {code.name}: {details[0]}")


class Served:
    """What a client knows of a model, and the messages that ask for its samples.

    Raises:
        Broken: the server's description of it cannot be read.

    Attributes:
        name: What it is served as.
        version: A whole number, as text.
        card: What it says of itself.
        digest: SHA-256 of the model file. Every request names it, so that no other model can answer.
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

    def _requests(self, noise: npt.ArrayLike, priority: Priority | None) -> list[wire.DecodeRequest]:
        """Return what asks for the images of noise, as many samples in a message as it holds."""
        with _rejecting():
            values = as_noise(noise, self.card.noise_size).astype("<f4", copy=False)
        rank = _among(PRIORITIES, priority) if priority else wire.PRIORITY_UNSPECIFIED
        parts = [values[at : at + self.batch].tobytes() for at in range(0, len(values), self.batch)]
        return [wire.DecodeRequest(model=self.name, version=self.digest, noise=part, priority=rank) for part in parts]

    def _joined(self, parts: Sequence[Images]) -> Images:
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, *self.card.image_shape), np.uint8), *parts])

    def _images(self, chunk: wire.Chunk) -> Images:
        self._check(chunk)
        shape = (chunk.count, chunk.height, chunk.width, chunk.channels)
        if len(chunk.pixels) != math.prod(shape):
            raise Broken(f"the server sent {len(chunk.pixels)} bytes for pictures of the shape {list(shape)}")
        return np.frombuffer(chunk.pixels, np.uint8).reshape(shape)

    def _files(self, chunk: wire.Chunk) -> list[tuple[int, bytes]]:
        self._check(chunk)
        if len(chunk.files) != chunk.count:
            raise Broken(f"the server sent {len(chunk.files)} files for {chunk.count} samples")
        return list(enumerate(chunk.files, chunk.start))

    def _check(self, chunk: wire.Chunk) -> None:
        if chunk.digest != self.digest:  # a server of before versions had digests
            raise self.changed()

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
    """Return the model called `name`, or the only one; its newest version where none is asked for.

    Raises:
        Rejected: no model has that name, or there are several and none is named.
        Unreachable: the server has no model yet.
    """
    if not models:
        raise Unreachable(f"the server at {address} has no model ready yet; run the command again in a moment")
    named = [model for model in models if name in ("", model.name) and version in ("", model.version, model.digest)]
    if len({model.name for model in named}) == 1:
        return max(named, key=lambda model: int(model.version or 1))
    have = ", ".join(sorted({model.name for model in models}))
    wanted = f"no model {name!r}" + (f" of version {version!r}" if version else "") if name else "several models"
    raise Rejected(f"the server at {address} has {wanted}; choose one with --model: {have}")
