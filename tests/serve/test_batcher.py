"""Whose turn it is, and that nobody can tell from the pictures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import Client, Engine, load
from serve.model import Images
from serve.noise import Noise
from serve.server.batcher import Batcher
from serve.server.models import Limits, Registry
from serve.server.refusal import Code, Refusal
from serve.server.wire import with_pixels
from serve.server.work import Budget, Request
from serve.stubs.sampling.v1 import sampling_pb2 as wire

SIDE = 4
PROBE = -1.0  # what no request has for noise


class Device:
    """An engine whose pictures say which samples they are; it computes when it is let."""

    def __init__(self, batch: int, free: bool = True) -> None:
        self.batch = batch
        self.batches: list[list[float]] = []
        self.free = threading.Semaphore(10**6 if free else 0)
        self.began = threading.Semaphore(0)

    def compute(self, noise: Noise) -> Images:
        self.began.release()
        self.free.acquire()
        self.batches.append(noise[:, 0].tolist())
        return pictures(noise)


class Watched:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Sequence[float]]] = []

    def computed(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        self.seen.append((samples, list(waits)))


def pictures(noise: Noise) -> Images:
    return np.broadcast_to(noise[:, :1, None, None].astype(np.uint8), (len(noise), SIDE, SIDE, 1)).copy()


def wanted(first: int, count: int, chunk: int = 0, **more: object) -> Request:
    """Samples whose noise is first, first + 1, ..."""
    return Request(
        lambda at, n: np.arange(first + at, first + at + n, dtype=np.float32)[:, None],
        count,
        chunk or count,
        **more,  # type: ignore[arg-type]
    )


async def collect(batcher: Batcher, request: Request) -> list[Images]:
    async with aclosing(batcher.run(request)) as chunks:
        return [np.concatenate(images) async for images in chunks]


def run(
    scenario: Callable[[Batcher], Awaitable[None]],
    devices: Sequence[Device],
    budget: Budget | None = None,
    **more: float,
) -> None:
    watched = Watched()

    async def all_of_it() -> None:
        known = budget or Budget(10**9, 10**12)
        probe = np.full((max((device.batch for device in devices), default=1), 1), PROBE, np.float32)
        batcher = Batcher(devices, known, SIDE * SIDE, more.get("delay", 0.0), watched, probe)
        await scenario(batcher)
        for device in devices:
            device.free.release(10**6)
        await asyncio.wait_for(batcher.close(), 60)
        assert batcher.waiting == 0

    asyncio.run(all_of_it())
    # Here and not where it is seen: an assertion that fails in an engine's thread fails no test.
    assert all(1 <= len(batch) <= device.batch for device in devices for batch in device.batches)
    asked_for = [batch for device in devices for batch in device.batches if batch[0] != PROBE]
    assert sum(samples for samples, _ in watched.seen) == sum(map(len, asked_for))
    assert all(waits and min(waits) >= 0 for _, waits in watched.seen)


@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 200),
            st.integers(1, 40),
            st.integers(1, 30),
            st.integers(1, 3),
            st.sampled_from(["bulk", "interactive"]),
        ),
        min_size=1,
        max_size=12,
    ),
    batches=st.lists(st.integers(1, 16), min_size=1, max_size=3),
    delay=st.sampled_from([0.0, 0.0005]),
)
@settings(max_examples=40, deadline=None)
def test_every_request_gets_its_own_samples_in_order_whatever_shares_its_batches(
    asked: list[tuple[int, int, int, int, str]], batches: list[int], delay: float
) -> None:
    budget = Budget(10**9, 10**12)

    async def scenario(batcher: Batcher) -> None:
        requests = [wanted(first, n, chunk, ahead=ahead, priority=who) for first, n, chunk, ahead, who in asked]
        results = await asyncio.gather(*(collect(batcher, request) for request in requests))
        for (first, count, chunk, _, _), chunks in zip(asked, results, strict=True):
            assert [len(each) for each in chunks[:-1]] == [chunk] * (len(chunks) - 1)
            assert np.array_equal(np.concatenate(chunks)[:, 0, 0, 0], np.arange(first, first + count) % 256)

    run(scenario, [Device(batch) for batch in batches], budget, delay=delay)
    assert (budget.held_samples, budget.held_bytes) == (0, 0)


def test_a_huge_request_starves_nobody_and_batches_are_shared() -> None:
    device = Device(8, free=False)

    async def scenario(batcher: Batcher) -> None:
        huge = asyncio.create_task(collect(batcher, wanted(0, 800)))
        await asyncio.to_thread(device.began.acquire)  # its first batch is being computed
        small = [asyncio.create_task(collect(batcher, wanted(1000 + each, 1))) for each in range(3)]
        await asyncio.sleep(0)
        device.free.release(2)
        await asyncio.gather(*small)
        assert device.batches[1] == [1000, 1001, 1002, 8, 9, 10, 11, 12]
        assert not huge.done()
        device.free.release(1000)
        await huge

    run(scenario, [device])


def test_two_requests_of_a_class_get_equal_shares_and_interactive_goes_before_bulk() -> None:
    def shares(first: str, second: str) -> tuple[int, int]:
        device = Device(4, free=False)

        async def scenario(batcher: Batcher) -> None:
            blocker = asyncio.create_task(collect(batcher, wanted(0, 1)))
            await asyncio.to_thread(device.began.acquire)
            both = [
                asyncio.create_task(collect(batcher, wanted(1000, 4000, priority=first))),
                asyncio.create_task(collect(batcher, wanted(9000, 4000, priority=second))),
            ]
            await asyncio.sleep(0)
            for _ in range(170):
                device.free.release()
                await asyncio.to_thread(device.began.acquire)
            for task in both:
                task.cancel()
            await asyncio.wait(both)
            device.free.release(1000)
            await blocker

        run(scenario, [device])
        given = [value for batch in device.batches[1:170] for value in batch]
        return sum(value < 9000 for value in given), sum(value >= 9000 for value in given)

    one, other = shares("bulk", "bulk")
    assert abs(one - other) <= 4
    bulk, interactive = shares("bulk", "interactive")
    assert 10 * bulk < interactive  # sixteen times the share
    assert bulk > 0  # yet some of it


def test_small_requests_that_never_cease_leave_a_stream_its_share() -> None:
    """However many come: four of 16 times its weight are in the queue with it all the time."""

    async def scenario(batcher: Batcher) -> None:
        stream = wanted(0, 10_000, ahead=10_000, priority="bulk")
        small = [wanted(0, 1) for _ in range(4 + 2000)]
        for request in (stream, *small[:4]):
            batcher._allow(request, request.count)
        come = iter(small[4:])
        for _ in range(1000):
            with batcher._changed:
                pieces = batcher._fill(2)
            for piece in pieces:
                if piece.request is not stream:
                    batcher._allow(next(come), 1)
        assert stream.given == pytest.approx(2000 / 65, abs=3)
        for request in (stream, *small):
            batcher._end(request)

    run(scenario, [])


@pytest.mark.parametrize("alone", [False, True])
def test_what_nobody_else_wanted_is_held_against_nobody(alone: bool) -> None:
    """A stream that had whole batches has half of them at once when another comes, and no less."""

    async def scenario(batcher: Batcher) -> None:
        first, second = (wanted(0, 100_000, ahead=100_000, priority="bulk") for _ in range(2))
        small = [wanted(0, 1) for _ in range(0 if alone else 400)]
        batcher._allow(first, first.count)
        for at in range(100):
            for request in small[4 * at : 4 * at + 4]:
                batcher._allow(request, 1)
            with batcher._changed:
                batcher._fill(64)
        before = first.given
        batcher._allow(second, second.count)
        for _ in range(20):
            with batcher._changed:
                batcher._fill(64)
        assert first.given - before == pytest.approx(640, abs=64)
        assert second.given == pytest.approx(640, abs=64)
        for request in (first, second):
            batcher._end(request)

    run(scenario, [])


def test_a_stream_is_computed_only_so_far_ahead_of_its_reader() -> None:
    device = Device(5)

    async def scenario(batcher: Batcher) -> None:
        request = wanted(0, 1000, chunk=10, ahead=2)
        async with aclosing(batcher.run(request)) as chunks:
            await anext(chunks)
            # Another request goes through all the same: the first one has nothing more to give.
            assert len(await collect(batcher, wanted(5000, 40, chunk=40))) == 1
            assert request.given == 20
            await anext(chunks)
            await collect(batcher, wanted(5000, 40, chunk=40))
            assert request.given == 30

    run(scenario, [device])


def test_who_leaves_takes_their_work_along() -> None:
    device = Device(4, free=False)
    budget = Budget(1000, 10**6)

    async def scenario(batcher: Batcher) -> None:
        leaving = asyncio.create_task(collect(batcher, wanted(0, 400)))
        await asyncio.to_thread(device.began.acquire)
        assert budget.held_samples == 400
        leaving.cancel()
        await asyncio.wait([leaving])
        assert (budget.held_samples, budget.held_bytes, batcher.waiting) == (0, 0, 0)
        device.free.release(10)
        assert await collect(batcher, wanted(7, 1))

    run(scenario, [device], budget)
    assert len(device.batches) == 2  # one that had begun, and the other request's


def test_nothing_is_computed_after_the_deadline() -> None:
    device = Device(4, free=False)

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(collect(batcher, wanted(0, 4)))
        await asyncio.to_thread(device.began.acquire)
        late = asyncio.create_task(collect(batcher, wanted(100, 4, deadline=time.monotonic())))
        await asyncio.sleep(0)
        device.free.release(10)
        with pytest.raises(Refusal) as refusal:
            await late
        assert refusal.value.code is Code.DEADLINE_EXCEEDED
        await first

    run(scenario, [device])
    assert device.batches == [[0, 1, 2, 3]]


def test_over_the_budget_is_refused_with_a_time_to_come_back() -> None:
    device = Device(4, free=False)

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(collect(batcher, wanted(0, 90)))
        await asyncio.to_thread(device.began.acquire)
        with pytest.raises(Refusal) as refusal:
            await collect(batcher, wanted(0, 20))
        assert refusal.value.code is Code.RESOURCE_EXHAUSTED
        assert refusal.value.retry_after is not None
        assert 0 < refusal.value.retry_after <= 30
        with pytest.raises(Refusal) as refusal:
            await collect(batcher, wanted(0, 101))
        assert (refusal.value.code, refusal.value.retry_after) == (Code.INVALID_ARGUMENT, None)  # it never fits
        device.free.release(1000)
        await first
        await collect(batcher, wanted(0, 20))

    run(scenario, [device], Budget(100, 10**6))


def test_a_device_that_fails_ends_its_batchs_requests_alone() -> None:
    class Failing(Device):
        def compute(self, noise: Noise) -> Images:
            if noise[0, 0] >= 5000:
                raise RuntimeError("the device is on fire")
            return super().compute(noise)

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="on fire"):
            await collect(batcher, wanted(5000, 3))
        assert len((await collect(batcher, wanted(0, 3)))[0]) == 3

    run(scenario, [Failing(4)])


def test_messages_stay_below_what_clients_take_by_default() -> None:
    for batch in (1, 8, 32, 256, 4096):
        for size in (768, 12_288, 196_608, 3_145_728):
            limits = Limits.of(batch, size)
            assert limits.files == 1 or limits.files < limits.count
            assert limits.count == 1 or limits.count * size < 4 * 2**20 - 1000
            assert limits.chunk == 1 or limits.chunk * size <= 2**20
            assert limits.chunk * size >= min(2**18, batch * size) or limits.chunk == limits.count
            assert (limits.ahead - 1) * limits.chunk >= batch


@given(plans=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300), st.integers(1, 60)), min_size=50, max_size=50))
@settings(max_examples=5, deadline=None)
def test_fifty_clients_at_once_get_the_bytes_that_each_would_get_alone(
    server: str, reference: dict[int, Images], plans: list[tuple[int, int, int]]
) -> None:
    def ask(plan: tuple[int, int, int]) -> bool:
        seed, start, count = plan
        with Client(server) as client:
            model = client.model()
            if count % 2:
                got = model.sample(seed, start, count)
            else:
                got = np.concatenate([images for _, images in model.stream(seed, start, count)])
        return np.array_equal(got, reference[seed][start : start + count])

    with ThreadPoolExecutor(50) as pool:
        assert all(pool.map(ask, plans))


@pytest.fixture(scope="module")
def reference(smoke_bundle: Path) -> dict[int, Images]:
    engine = Engine(load(smoke_bundle))
    return {seed: engine.sample(seed, 0, 400) for seed in range(4)}


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    name=st.text(max_size=200),
    side=st.sampled_from([1, 7, 64]),
)
@settings(max_examples=60, deadline=None)
def test_pixels_behind_a_message_are_what_protobuf_would_read(counts: list[int], name: str, side: int) -> None:
    chance = np.random.default_rng(0)
    images = [chance.integers(0, 256, (count, side, side, 3), np.uint8) for count in counts]
    chunk = wire.Chunk(start=7, digest=name)
    read = wire.SampleResponse.FromString(with_pixels(chunk, 10, images, inside=1)).chunk
    assert (read.start, read.digest) == (7, name)
    assert read.pixels == b"".join(each.tobytes() for each in images)
    assert wire.Chunk.FromString(with_pixels(chunk, 10, images)) == read


def test_a_few_pictures_do_not_keep_a_whole_batch_in_memory() -> None:
    async def scenario(batcher: Batcher) -> None:
        async with aclosing(batcher.run(wanted(0, 8, chunk=1))) as chunks:
            async for (images,) in chunks:
                assert images.base is None
        async with aclosing(batcher.run(wanted(0, 8, chunk=8))) as chunks:
            async for (images,) in chunks:
                assert images.base is not None  # all of it was asked for: no copy

    run(scenario, [Device(8)])


class Curious(Watched):
    """A watcher with a bug that shows once."""

    failed = False

    def computed(self, samples: int, waits: Sequence[float], seconds: float) -> None:
        if not self.failed:
            self.failed = True
            raise ValueError("a bug")


def test_whatever_breaks_in_an_engines_thread_ends_requests_and_not_the_thread() -> None:
    async def scenario() -> None:
        batcher = Batcher([Device(4)], Budget(10**9, 10**12), SIDE * SIDE, 0.0, Curious(), np.zeros((4, 1), np.float32))
        # Two batches: a request of one may have all its pictures before the watcher breaks.
        with pytest.raises(ValueError, match="a bug"):
            await collect(batcher, wanted(0, 8))
        # A deadline that cannot be compared breaks the queue itself, before anybody knows whose turn it is.
        async with aclosing(batcher.run(wanted(0, 10**9, chunk=2))) as beside:
            await anext(beside)
            with pytest.raises(TypeError):
                await collect(batcher, wanted(0, 4, deadline="never"))
            with pytest.raises(TypeError):
                async for _ in beside:
                    pass
        assert [len(chunk) for chunk in await collect(batcher, wanted(0, 4))] == [4]
        assert batcher.working
        await batcher.close()

    asyncio.run(asyncio.wait_for(scenario(), 100))


def test_models_can_be_read_by_any_thread_while_they_come_and_go() -> None:
    problems: list[Exception] = []

    async def scenario() -> None:
        registry, done = Registry(), threading.Event()

        def read() -> None:
            try:
                while not done.is_set():
                    for model in registry.models():
                        assert model.name
                    assert len(registry) >= 0
            except Exception as problem:
                problems.append(problem)

        reader = threading.Thread(target=read)
        reader.start()
        for turn in range(3000):
            batcher = SimpleNamespace(close=lambda: asyncio.sleep(0), working=True)
            model: Any = SimpleNamespace(name=f"m{turn % 7}", version=turn % 3 + 1, batcher=batcher, working=True)
            registry.put(model)
            if turn % 2:
                registry.drop(model)
        done.set()
        reader.join()
        await registry.close()

    asyncio.run(scenario())
    assert not problems
