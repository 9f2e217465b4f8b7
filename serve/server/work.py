"""What the batcher works on: requests and their pieces, the budget they share, and what it needs of engines."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serve.card import Card
from serve.model import Images
from serve.noise import Noise


class Backend(Protocol):
    """What a server needs of an engine.

    Attributes:
        card: What the model says of itself.
        digest: SHA-256 of the model file.
        arithmetic: What it computes in, as `GenerativeModel.arithmetic`.
        device: Where it runs, such as "cpu" or "cuda:0".
    """

    card: Card
    digest: str
    arithmetic: str
    device: str

    @property
    def batch(self) -> int:
        """The most samples that `compute` takes."""

    def compute(self, noise: Noise) -> Images:
        """Return the images of noise [n, noise_size], 1 <= n <= batch: uint8 [n, height, width, channels]."""


class BatchObserver(Protocol):
    """Whoever measures what the batcher does."""

    def computed(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        """Take note of a batch: its samples, how long each part of it waited, how long it computed."""


@dataclass(eq=False)
class Budget:
    """The most work that a server holds at a time, in samples and in bytes of pictures.

    Attributes:
        make_room: Called when something does not fit.
    """

    samples: int
    bytes: int
    held_samples: int = 0
    held_bytes: int = 0
    make_room: Callable[[], None] = lambda: None

    def fits(self, samples: int, size: int) -> bool:
        """Tell whether so much more may be held."""
        return self.held_samples + samples <= self.samples and self.held_bytes + size <= self.bytes

    def hold(self, samples: int, size: int) -> None:
        """Count work, or with negative numbers its end."""
        self.held_samples += samples
        self.held_bytes += size


@dataclass(eq=False)
class Request:
    """Samples that one caller wants, in chunks, in order.

    Args:
        noise: Gives the noise [count, noise_size] of samples offset ... offset + count - 1.
        count: How many samples.
        chunk: Samples that the caller takes at a time.
        ahead: Chunks that may be computed before the caller has taken the one before them.
        priority: "interactive" or "bulk".
        deadline: In time.monotonic()'s seconds; nothing is computed for it later.
    """

    noise: Callable[[int, int], Noise]
    count: int
    chunk: int
    ahead: int = 2
    priority: str = "interactive"
    deadline: float = math.inf
    # The queue's side, under its lock.
    given: int = 0  # samples that engines were given
    limit: int = 0  # samples that they may be given by now
    virtual: float = 0.0
    queued: bool = False
    since: float = 0.0  # when it came to wait
    ended: bool = False
    # The reader's side, on the event loop.
    problem: Exception | None = None
    chunks: dict[int, list[tuple[int, Images]]] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def wanted(self) -> int:
        """Samples that may be computed now."""
        return 0 if self.ended else min(self.limit, self.count) - self.given

    @property
    def held(self) -> int:
        """The most samples that are ever held for it."""
        return min(self.count, self.chunk * self.ahead)


@dataclass(frozen=True)
class Piece:
    """The part of a request that shares a batch with others."""

    request: Request
    offset: int
    count: int
    waited: float  # seconds
