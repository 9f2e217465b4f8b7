"""One model on several servers: a long range is cut into pieces, and each server makes the next piece that nobody has.

A sample is the same picture whoever makes it. So a piece of a server that is lost is asked for elsewhere, and so is one
that takes much longer than the others: whoever answers first has made it.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serve.client.options import Options
from serve.client.sync import Client, RemoteModel
from serve.encoding import pictures
from serve.errors import Broken, Changed, Closed, Overloaded, Rejected, RemoteError, TimedOut, Unreachable
from serve.model import Images, check_sampling

if TYPE_CHECKING:
    from PIL.Image import Image

PIECE, PIECE_BYTES = 1024, 16 << 20  # samples, and their pixels, at most
LEAST_PIECE = 64  # samples, below which asking costs more than it shares
SHARES = 2  # pieces a server, at least, of a range that has enough
AHEAD = 3  # pieces a server that may wait for an earlier one: bounds memory
SLOW = 3.0  # times what a piece takes elsewhere, after which it is asked for elsewhere too
PAUSE = 0.5  # seconds that a server is left alone after it failed
GONE = (Unreachable, Overloaded, Broken, TimedOut)  # of one server; another may do better

log = logging.getLogger(__name__)


class Fleet:
    """Connections to several servers; a context manager.

    Args:
        addresses: As `Client` takes one.
        options: For each of them; `patience` is how long all may be away together.

    Raises:
        RemoteError: as `Client`.
    """

    def __init__(self, addresses: Sequence[str], options: Options = Options()) -> None:  # noqa: B008 (it is frozen)
        self.options = options
        # A server that is away is no reason to wait while there are others.
        each = replace(options, patience=0.0, start=0.0)
        self.clients = [Client(address, each) for address in addresses]
        self._closed = threading.Event()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections, as `Client.close`."""
        self._closed.set()
        for client in self.clients:
            client.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def model(self, name: str = "", version: str = "") -> FleetModel:
        """Return a model that all servers have which answer; those that do not may come back.

        Where none has it yet, they are waited for: as long as `Options.patience` says if one of them answers, since it
        still loads its models or is full, and otherwise as long as `Options.start` says.

        Raises:
            Changed: two servers have different models of the name, or compute in different arithmetics.
            RemoteError: no server answers, or one has no such model.
        """
        since, said = time.monotonic(), ""
        while True:
            found, failed = self._ask(name, version)
            if found:
                break
            said = self._wait(list(failed.values()), since, said)
        for client, why in failed.items():
            log.warning("beginning without %s: %s", client.address, why)
        first, *others = found.items()
        for client, model in others:
            for what in ("digest", "arithmetic"):
                here, there = (getattr(each, what) for each in (first[1], model))
                if here != there:
                    raise Changed(
                        f"the servers {first[0].address} and {client.address} should have one {what} of "
                        f"{model.name}. Received: {here[:16]} and {there[:16]}; address servers that have the same"
                    )
        return FleetModel(self, first[1], found)

    def _ask(self, name: str, version: str) -> tuple[dict[Client, RemoteModel], dict[Client, RemoteError]]:
        """Return the model as each server has it, and why the others have not."""
        found: dict[Client, RemoteModel] = {}
        failed: dict[Client, RemoteError] = {}
        for client in self.clients:
            try:
                found[client] = client.model(name, version)
            except GONE as error:
                failed[client] = error
        return found, failed

    def _wait(self, failed: list[RemoteError], since: float, said: str) -> str:
        """Wait before all are asked again, and return what was said of that, once.

        Raises:
            RemoteError: they were waited for long enough.
        """
        answers = [error for error in failed if error.retry_after]
        if answers:
            error, most, what = answers[0], self.options.patience, "can serve the model yet"
        else:
            error, most, what = failed[0], self.options.start, "answers yet"
        pause = max(PAUSE, min((each.retry_after for each in answers), default=0.0))
        if time.monotonic() + pause > since + most:
            raise error
        if what != said:
            log.warning("none of %d servers %s; waiting for them, %.0f s at most", len(failed), what, most)
        self._closed.wait(pause)
        return what


@dataclass(frozen=True)
class Range:
    """What a stream is for."""

    seed: int
    start: int
    count: int
    temperature: float


@dataclass
class Piece:
    """A part of a range, and what is known of it."""

    at: int
    count: int
    began: float = 0.0
    takers: list[Client] = field(default_factory=list)  # that are at it
    images: Images | None = None


class FleetModel:
    """A model on several servers: a `serve.model.GenerativeModel`."""

    def __init__(self, fleet: Fleet, model: RemoteModel, found: dict[Client, RemoteModel]) -> None:
        self._fleet, self._model, self._found = fleet, model, dict(found)
        self.card, self.digest, self.arithmetic = model.card, model.digest, model.arithmetic

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def batch(self) -> int:
        """The most samples that a server puts into one message."""
        return self._model.batch

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """As `GenerativeModel.sample`."""
        parts = [images for _, images in self.stream(seed, start, count, temperature)]
        return np.concatenate([np.empty((0, *self.card.image_shape), np.uint8), *parts])

    def pictures(self, seed: int, start: int, count: int, temperature: float = 1.0) -> list[Image]:
        """As `GenerativeModel.pictures`."""
        return pictures(self.sample(seed, start, count, temperature))

    def decode(self, noise: npt.ArrayLike) -> Images:
        """As `GenerativeModel.decode`, by the first server that does it."""
        failed: RemoteError | None = None
        for client in self._fleet.clients:
            try:
                return self.on(client).decode(noise)
            except GONE as error:
                failed = error
        assert failed is not None
        raise failed

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """As `GenerativeModel.stream`, a piece at a time.

        Raises:
            Changed: a server has another model now.
            RemoteError: no server has made anything for as long as `Options.patience` says.
        """
        try:
            check_sampling(seed, start, count, temperature)
        except ValueError as error:
            raise Rejected(str(error)) from None
        yield from _Work(self, self._fleet, Range(seed, start, count, temperature))

    def on(self, client: Client) -> RemoteModel:
        """Return the model as one of the servers has it; a server that was away is asked for it.

        Raises:
            Changed: it is another one.
            RemoteError: it does not answer.
        """
        if client not in self._found:
            model = client.model(self.name, self.digest)
            if model.arithmetic != self.arithmetic:
                raise Changed(
                    f"the server {client.address} computes {self.name} in {model.arithmetic} arithmetic, where "
                    f"{self.arithmetic} was begun with; address servers of one arithmetic"
                )
            self._found[client] = model
        return self._found[client]


class _Work:
    """One stream: a thread for each server takes pieces, and the reader gets them in order."""

    def __init__(self, model: FleetModel, fleet: Fleet, wanted: Range) -> None:
        self._model, self._fleet, self._wanted = model, fleet, wanted
        self._next, self._stop = wanted.start, wanted.start + wanted.count
        fair = max(LEAST_PIECE, -(-wanted.count // (SHARES * len(fleet.clients))))
        self._size = max(1, min(PIECE, PIECE_BYTES // math.prod(model.card.image_shape), fair))
        self._window: deque[Piece] = deque()  # what the reader has not had, in order
        self._took: deque[float] = deque(maxlen=32)  # seconds of the last pieces
        self._changed = threading.Condition()
        self._over = False
        self._error: RemoteError | None = None  # that ends the stream
        self._gone: RemoteError | None = None  # of a server, since anything was made

    def __iter__(self) -> Iterator[tuple[int, Images]]:
        for client in self._fleet.clients:
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        try:
            at = self._wanted.start
            while at < self._stop:
                piece = self._wait(at)
                assert piece.images is not None
                yield at, piece.images
                at += piece.count
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _wait(self, at: int) -> Piece:
        """Return the piece that begins there, once it is made.

        Raises:
            RemoteError: as `FleetModel.stream`.
        """
        since = time.monotonic()
        with self._changed:
            while not self._window or self._window[0].images is None:
                if self._fleet.closed:
                    raise Closed(f"the client of {self._fleet.clients[0].address} is closed; make another one")
                if self._error is not None:
                    raise self._error
                if self._gone is not None and time.monotonic() > since + self._fleet.options.patience:
                    raise self._gone
                self._changed.wait(PAUSE)
            self._changed.notify_all()  # there is room for another
            return self._window.popleft()

    def _serve(self, client: Client) -> None:
        """Make pieces on one server until there are no more."""
        away = False
        while (piece := self._take(client)) is not None:
            began = time.monotonic()
            images, error = None, None
            try:
                asked = self._wanted
                images = self._model.on(client).sample(asked.seed, piece.at, piece.count, asked.temperature, "bulk")
            except RemoteError as failure:
                error = failure
            with self._changed:
                piece.takers.remove(client)
                if images is not None:
                    self._took.append(time.monotonic() - began)
                    self._gone, away = None, False
                    piece.images = images if piece.images is None else piece.images
                elif isinstance(error, GONE):
                    if not away:
                        log.warning("going on without %s: %s", client.address, error)
                    self._gone, away = error, True
                else:
                    self._error = error
                self._changed.notify_all()
                if isinstance(error, GONE):
                    self._changed.wait_for(lambda: self._over, max(PAUSE, error.retry_after))

    def _take(self, client: Client) -> Piece | None:
        """Return a piece for a server to make, as soon as there is one; None where the stream is over."""
        with self._changed:
            while not self._over and self._error is None:
                piece = self._free() or self._slow(client)
                if piece is not None:
                    piece.began = time.monotonic()
                    piece.takers.append(client)
                    return piece
                self._changed.wait(PAUSE)
        return None

    def _free(self) -> Piece | None:
        """Return a piece that nobody makes: one that was given back, or the next."""
        for piece in self._window:
            if piece.images is None and not piece.takers:
                return piece
        if self._next < self._stop and len(self._window) < AHEAD * len(self._fleet.clients):
            piece = Piece(self._next, min(self._size, self._stop - self._next))
            self._next += piece.count
            self._window.append(piece)
            return piece
        return None

    def _slow(self, client: Client) -> Piece | None:
        """Return the first piece that another server has been at for too long."""
        if not self._took:
            return None
        late = time.monotonic() - SLOW * statistics.median(self._took)
        for piece in self._window:
            if piece.images is None and piece.began < late and len(piece.takers) == 1 and client not in piece.takers:
                return piece
        return None
