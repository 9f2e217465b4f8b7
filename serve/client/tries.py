"""Asking again: which failures are worth it, when, and how long."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

import grpc

from serve.client.failures import Code, explain, nobody_listens, retry_delay, unhealthy
from serve.client.protocol import Connection, Served
from serve.errors import Broken, Closed, Overloaded, RemoteError, ServeError
from serve.stubs.sampling.v1 import sampling_pb2 as wire

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds

log = logging.getLogger(__name__)


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
        self.be_patient()

    def be_patient(self) -> None:
        """Begin to be patient anew: the server did something, or its reader comes back from doing so."""
        self._backoff = FIRST_PAUSE
        self._since = time.monotonic()
        self._answered = False  # that it cannot do it yet
        self._said = ""

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
        address, options, code = self._connection.address, self._connection.options, failure.code()
        if self._model and code is Code.NOT_FOUND:  # it was there before
            raise self._model.changed() from None
        error, seconds = explain(address, failure, options), retry_delay(failure)
        if seconds is not None:  # it answers, and says when to come back
            error.retry_after = seconds
            self._connection.met = True
            if not self._answered:  # however long it was waited for to start
                self._answered, self._since = True, time.monotonic()
            return self._wait(error, options.patience, str(error), seconds)
        if code not in (Code.UNAVAILABLE, Code.CANCELLED):
            raise error from None
        if unhealthy(failure):
            return self._wait(error, options.patience, f"no server at {address} is ready yet")
        if self._connection.met:
            return self._wait(error, options.patience, f"the server at {address} does not answer any more")
        # An address that never answered is more likely wrong than away for a while.
        start = options.start if nobody_listens(address, failure) else 0.0
        return self._wait(error, start, f"no server answers at {address} yet")

    def _wait(self, error: RemoteError, most: float, what: str, seconds: float | None = None) -> float:
        """Return the seconds to wait because of an error, or raise it; say what is waited for, once."""
        seconds = self._backoff if seconds is None else max(FIRST_PAUSE, seconds)
        left = self._since + most - time.monotonic()
        if left <= 0:
            raise error from None
        if what != self._said:
            # A busy server is an everyday matter; one that is away, or not there yet, may keep somebody waiting.
            level = logging.INFO if isinstance(error, Overloaded) else logging.WARNING
            log.log(level, "%s; waiting for it, %.0f s at most", what, most)
            self._said = what
        self._backoff = min(2 * self._backoff, LONGEST_PAUSE)
        return min(left, seconds * random.uniform(1.0, 1.25))  # noqa: S311 (spreads clients, hides nothing)


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
