"""The pieces of a range that several servers make: who makes which, and whose is asked for again elsewhere."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serve.card import Card
from serve.client.options import Options
from serve.client.sync import Client, RemoteModel
from serve.errors import Broken, Closed, Overloaded, RemoteError, TimedOut, Unreachable
from serve.model import Images

PIECE, PIECE_BYTES = 1024, 16 << 20  # samples, and their pixels, at most
LEAST_PIECE = 64  # samples, below which asking costs more than it shares
SHARES = 2  # pieces a server, at least, of a range that has enough
AHEAD = 3  # pieces a server that may wait for an earlier one: bounds memory
SLOW = 3.0  # times what a piece takes elsewhere, after which it is asked for elsewhere too
UNKNOWN, LEAST_SLOW = 5.0, 1.0  # seconds, where nothing is known of what it takes, and at least
PAUSE = 0.5  # seconds that a server is left alone after it failed
GONE = (Unreachable, Overloaded, Broken, TimedOut)  # of one server; another may do better


class Servers(Protocol):
    """Whoever makes pieces: a `Fleet`."""

    clients: list[Client]
    options: Options

    @property
    def closed(self) -> bool: ...

    def lost(self, client: Client, why: object) -> None: ...

    def back(self, client: Client) -> None: ...


class Shared(Protocol):
    """The model that they all have, and how they fare with it: a `FleetModel`."""

    card: Card
    took: deque[float]
    hung: set[Client]

    def on(self, client: Client) -> RemoteModel: ...


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
    began: float = 0.0  # by the last of its takers
    takers: set[Client] = field(default_factory=set)  # that are at it
    images: Images | None = None


class Work:
    """One stream: a thread for each server takes pieces, and the reader gets them in order."""

    def __init__(self, model: Shared, fleet: Servers, wanted: Range) -> None:
        self._model, self._fleet, self._wanted = model, fleet, wanted
        self._next, self._stop = wanted.start, wanted.start + wanted.count
        fair = max(LEAST_PIECE, -(-wanted.count // (SHARES * len(fleet.clients))))
        self._size = max(1, min(PIECE, PIECE_BYTES // math.prod(model.card.image_shape), fair))
        self._window: deque[Piece] = deque()  # what the reader has not had, in order
        self._changed = threading.Condition()
        self._over = False
        self._error: Exception | None = None  # that ends the stream
        self._away: dict[Client, RemoteError] = {}
        self._sent: dict[Client, float] = {}  # when those that are at a piece last sent some of it
        self._alone = math.inf  # since when there is no server

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
                now = time.monotonic()
                self._alone = min(self._alone, now) if all(map(self._misses, self._fleet.clients)) else math.inf
                # However long the reader took over the piece before.
                if now >= max(since, self._alone) + self._fleet.options.patience:
                    raise next(iter(self._away.values()), TimedOut("the servers hang: none answered in time"))
                self._changed.wait(PAUSE)
            self._changed.notify_all()  # there is room for another
            return self._window.popleft()

    def _serve(self, client: Client) -> None:
        """Make pieces on one server until there are no more."""
        while (piece := self._take(client)) is not None:
            began = time.monotonic()
            images, error = None, None
            try:
                images = self._make(client, piece)
            except Exception as failure:  # whatever it is, the reader waits for this piece
                error = failure
            with self._changed:
                piece.takers.discard(client)
                del self._sent[client]
                self._model.hung.discard(client)
                if images is not None:
                    self._model.took.append((time.monotonic() - began) / piece.count)
                    self._fleet.back(client)
                    self._away.pop(client, None)
                    piece.images = images if piece.images is None else piece.images
                elif isinstance(error, GONE):
                    self._fleet.lost(client, error)
                    self._away[client] = error
                else:
                    self._error = error
                self._changed.notify_all()
                if isinstance(error, GONE):
                    self._changed.wait_for(lambda: self._over, max(PAUSE, error.retry_after))

    def _make(self, client: Client, piece: Piece) -> Images:
        """Return a piece's samples, as one server makes them.

        Raises:
            RemoteError: it does not.
        """
        model, asked = self._model.on(client), self._wanted
        if piece.count <= model.batch:  # one call, which has to end in time
            return model.sample(asked.seed, piece.at, piece.count, asked.temperature, "bulk")
        parts = []
        for _, images in model.stream(asked.seed, piece.at, piece.count, asked.temperature, "bulk"):
            parts.append(images)
            with self._changed:
                self._sent[client] = time.monotonic()
                self._away.pop(client, None)
        return np.concatenate(parts)

    def _misses(self, client: Client) -> bool:
        """Tell whether a server is away, or hangs: at a piece of this stream, or else at one of another."""
        if client in self._away:
            return True
        sent = self._sent.get(client)
        if sent is None:
            return client in self._model.hung
        return sent + self._fleet.options.timeout < time.monotonic()

    def _take(self, client: Client) -> Piece | None:
        """Return a piece for a server to make, as soon as there is one; None where the stream is over."""
        with self._changed:
            while not self._over and self._error is None:
                piece = None if client in self._model.hung else self._free() or self._slow(client)
                if piece is not None:
                    piece.began = self._sent[client] = time.monotonic()
                    piece.takers.add(client)
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
        """Return the first piece that other servers have been at for too long."""
        took = self._model.took
        usual = statistics.median(took) if took else None
        now = time.monotonic()
        for piece in self._window:
            if piece.images is None and client not in piece.takers:
                most = UNKNOWN if usual is None else max(LEAST_SLOW, SLOW * usual * piece.count)
                if now > piece.began + most:
                    self._model.hung |= piece.takers
                    return piece
        return None
