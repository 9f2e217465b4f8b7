"""The batcher: whose samples the engines compute next.

Requests from all clients wait in one weighted fair queue (Demers et al. 1989): each has a virtual time that advances
by the samples it was given, divided by its class's weight, and the one furthest behind goes first. A newcomer begins at
the queue's own virtual time, which advances by the samples of each batch, divided by the weights of all who wanted some
of it. So requests of a class have equal shares however large they are, a newcomer goes before whoever had its share,
and nothing starves, however many small requests come one after the other. A batch is filled from as many requests as it
takes; the noise contract makes that invisible in the pictures.

Every engine has a thread that takes from the queue; the event loop only puts requests in and waits for chunks. A
request may run only some chunks ahead of its reader, which bounds the memory of a stream of any length.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

import numpy as np

from serve.model import Images
from serve.noise import Noise
from serve.server.refusal import Code, Refusal, invalid
from serve.server.work import Backend, BatchObserver, Budget, Piece, Request

log = logging.getLogger("serve-vae")

WEIGHT = {"interactive": 16.0, "bulk": 1.0}
EQUAL = 1e-3  # of virtual time: whoever is behind by less is not
RATE_MEMORY = 0.9  # of the running mean of samples a second
PROBE_SECONDS = 1.0  # between two looks at an engine that failed
LONGEST_RETRY = 30.0  # seconds


class Batcher:
    """A queue and the engines that work on it. Make it on a running event loop.

    An engine that fails ends the requests of that batch, and takes part again once it has computed the probe. While
    none takes part, nothing is accepted.

    Args:
        engines: One a device; each gives the same samples.
        budget: Shared by all batchers of a server.
        sample_bytes: Bytes of one picture.
        delay: Seconds that a batch which is not full may wait for more.
        observer: Takes note of each batch.
        probe: Noise [batch, noise_size] that an engine which works has pictures for.
        changed: Called on the event loop when `working` may have changed.
    """

    def __init__(
        self,
        engines: Sequence[Backend],
        budget: Budget,
        sample_bytes: int,
        delay: float,
        observer: BatchObserver,
        probe: Noise,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._engines = engines
        self._probe = probe
        self._tell = changed
        self._failing: set[Backend] = set()
        self._live: set[Request] = set()
        self._budget = budget
        self._sample_bytes = sample_bytes
        self._delay = delay
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, int, Request]] = []
        self._order = itertools.count()
        self._virtual = 0.0
        self._weight = 0.0  # of all in the queue
        self._rate = 0.0  # of one engine, samples a second
        self._ending = threading.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.waiting = 0  # samples in the queue
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in engines]
        for thread in self._threads:
            thread.start()

    @property
    def working(self) -> bool:
        """Whether an engine takes part; for the event loop."""
        return len(self._failing) < len(self._engines)

    async def run(self, request: Request) -> AsyncGenerator[list[Images]]:
        """Yield a request's chunks: arrays [n, height, width, channels] that together are the chunk, in order.

        Close it (contextlib.aclosing) once the last chunk has left: until then it is held against the budget, and what
        was not computed by then never will be.

        Raises:
            Refusal: the server is full, no engine works, or the deadline passed.
            Exception: whatever the engine raised.
        """
        if not self.working:
            raise Refusal(
                Code.UNAVAILABLE, "the model's device fails; repeat here later, or elsewhere now", PROBE_SECONDS
            )
        held, size = request.held, request.held * self._sample_bytes
        if held > self._budget.samples or size > self._budget.bytes:
            raise invalid(
                f"this request holds {held} samples at a time, and the server {self._budget.samples} or "
                f"{self._budget.bytes >> 20} MiB of all callers; ask for fewer at a time"
            )
        if not self._budget.fits(held, size):
            self._budget.make_room()
            raise Refusal(
                Code.RESOURCE_EXHAUSTED,
                f"the server is full: {self._budget.held_samples} samples are under way and {held} more do not fit in "
                f"{self._budget.samples} or {self._budget.bytes >> 20} MiB; repeat after the delay in RetryInfo",
                self._retry_after(),
            )
        self._budget.hold(held, size)
        self._live.add(request)
        self._idle.clear()
        try:
            for at in range(0, request.count, request.chunk):
                self._allow(request, at + held)
                yield await _chunk(request, at // request.chunk, min(request.chunk, request.count - at))
        finally:
            self._end(request)
            request.chunks.clear()
            self._budget.hold(-held, -size)
            self._live.discard(request)
            if not self._live:
                self._idle.set()

    async def close(self) -> None:
        """Wait until every request is done, then end the threads."""
        await self._idle.wait()
        with self._changed:
            self._ending.set()
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _retry_after(self) -> float:
        """Return when about half of what is under way will be done, in seconds."""
        seconds = self._budget.held_samples / (self._rate * len(self._engines)) / 2 if self._rate else 1.0
        return min(max(seconds, 0.05), LONGEST_RETRY)

    def _allow(self, request: Request, limit: int) -> None:
        with self._changed:
            before = request.wanted
            request.limit = limit
            self.waiting += request.wanted - before
            self._queue(request)

    def _end(self, request: Request) -> None:
        with self._changed:
            self.waiting -= request.wanted
            request.ended = True

    def _queue(self, request: Request) -> None:
        """Put a request that wants something into the queue, once. The lock is held."""
        if request.queued or not request.wanted:
            return
        request.queued = True
        request.since = time.monotonic()
        # Who wanted nothing for a while has no claim to what it left to others.
        request.virtual = max(request.virtual, self._virtual - EQUAL)
        self._weight += WEIGHT[request.priority]
        heapq.heappush(self._heap, (request.virtual, request.given, next(self._order), request))
        self._changed.notify()

    def _deliver(self, pieces: list[Piece], images: Images) -> None:
        """Hand out a batch's pictures, on the event loop; views, so that the one copy is that into a message.

        But not where a few would keep many in memory, which nobody counts.
        """
        at, whole = 0, images if images.base is None else images.base
        for piece in pieces:
            request = piece.request
            for offset, index, count in _by_chunk(piece):
                begin = at + offset - piece.offset
                if not request.ended:
                    part = images[begin : begin + count]
                    part = part if 2 * part.nbytes > whole.nbytes else part.copy()
                    request.chunks.setdefault(index, []).append((offset, part))
            at += piece.count
            request.arrived.set()

    def _fail(self, requests: Iterable[Request], problem: Exception) -> None:
        """End requests, on the event loop."""
        for request in requests:
            self._end(request)
            request.problem = problem
            request.arrived.set()

    def _lose(self, pieces: list[Piece], problem: Exception) -> None:
        """End the requests of a batch that failed; where the queue itself failed, end all of them."""
        self._fail({piece.request for piece in pieces} or set(self._live), problem)

    def _is_failing(self, engine: Backend, problem: Exception) -> None:
        """Go on without an engine, on the event loop."""
        self._failing.add(engine)
        if not self.working:
            self._fail(set(self._live), problem)
        self._tell()

    def _is_working(self, engine: Backend) -> None:
        self._failing.discard(engine)
        self._tell()

    # What follows runs in the engines' threads.

    def _work(self, engine: Backend) -> None:
        pieces: list[Piece] = []
        while True:
            try:
                while pieces := self._take(engine.batch):
                    self._compute(engine, pieces)
                    pieces = []
                return
            except Exception as error:  # the thread outlives any error, and its requests end instead of waiting
                self._loop.call_soon_threadsafe(self._lose, pieces, error)
                if not self._outlive(engine):
                    return

    def _compute(self, engine: Backend, pieces: list[Piece]) -> None:
        began = time.monotonic()
        images = engine.compute(_noise(pieces))
        seconds = time.monotonic() - began
        self._loop.call_soon_threadsafe(self._deliver, pieces, images)
        rate = len(images) / max(seconds, 1e-9)
        self._rate = RATE_MEMORY * (self._rate or rate) + (1 - RATE_MEMORY) * rate
        self._observer.computed(len(images), [piece.waited for piece in pieces], seconds)

    def _outlive(self, engine: Backend) -> bool:
        """Wait until an engine computes the probe; tell whether it did before the end."""
        failing = False
        while True:
            try:
                engine.compute(self._probe[: engine.batch])
            except Exception as error:
                if not failing:
                    failing = True
                    log.error("a device fails; it is asked again every %.0f s: %s", PROBE_SECONDS, error)
                    self._loop.call_soon_threadsafe(self._is_failing, engine, error)
            else:
                if failing:
                    log.info("the device that failed works again")
                    self._loop.call_soon_threadsafe(self._is_working, engine)
                return True
            if self._ending.wait(PROBE_SECONDS):  # not for the queue's condition: it wakes who can work
                return False

    def _take(self, batch: int) -> list[Piece]:
        """Wait for work, and return up to a batch of it; nothing at the end."""
        with self._changed:
            pieces: list[Piece] = []
            while not pieces:
                while not self._heap:
                    if self._ending.is_set():
                        return []
                    self._changed.wait()
                until = time.monotonic() + self._delay
                while self.waiting < batch and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                pieces = self._fill(batch)
            return pieces

    def _fill(self, room: int) -> list[Piece]:
        """Return whose turn it is. The lock is held."""
        now, pieces, expired = time.monotonic(), [], []
        weight = self._weight
        while self._heap and room:
            request = heapq.heappop(self._heap)[-1]
            request.queued = False
            self._weight -= WEIGHT[request.priority]
            count = min(request.wanted, room)
            if not count:
                continue
            if request.deadline <= now:
                expired.append(request)
                continue
            pieces.append(Piece(request, request.given, count, now - request.since))
            request.virtual += count / WEIGHT[request.priority]
            request.given += count
            self.waiting -= count
            room -= count
            self._queue(request)
        if pieces:
            self._virtual += sum(piece.count for piece in pieces) / weight
            # What nobody else wanted is held against nobody: the queue is never behind all who wait.
            least = self._heap[0][0] if self._heap else max(piece.request.virtual for piece in pieces)
            self._virtual = max(self._virtual, least)
        if expired:
            late = Refusal(Code.DEADLINE_EXCEEDED, "the deadline passed before an engine was free; allow more time")
            self._loop.call_soon_threadsafe(self._fail, expired, late)
        return pieces


async def _chunk(request: Request, index: int, count: int) -> list[Images]:
    """Wait for all parts of a chunk."""
    while request.problem is None and sum(len(images) for _, images in request.chunks.get(index, ())) < count:
        request.arrived.clear()
        await request.arrived.wait()
    if request.problem is not None:
        raise request.problem
    parts = sorted(request.chunks.pop(index), key=lambda part: part[0])  # two engines may finish out of turn
    return [images for _, images in parts]


def _by_chunk(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, index of the chunk, count) for each chunk that a piece touches."""
    at, stop, chunk = piece.offset, piece.offset + piece.count, piece.request.chunk
    while at < stop:
        count = min(stop - at, chunk - at % chunk)
        yield at, at // chunk, count
        at += count


def _noise(pieces: list[Piece]) -> Noise:
    noises = [piece.request.noise(piece.offset, piece.count) for piece in pieces]
    return noises[0] if len(noises) == 1 else np.concatenate(noises)
