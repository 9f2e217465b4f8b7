"""The client when things go wrong: what it asks for again, where it goes on, what it says."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serve import AsyncClient, Client, Engine, Options, RemoteError, load
from serve import errors as names
from serve.errors import Broken, Changed, Closed, Rejected, ServeError, TimedOut, Unreachable
from serve.model import Images
from serve.noise import draw
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import free_address, serving


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle))


def joined(parts: list[tuple[int, Images]]) -> Images:
    return np.concatenate([images for _, images in parts])


def test_asyncio_has_all_that_the_blocking_client_has(server: str, engine: Engine) -> None:
    async def use() -> None:
        async with AsyncClient(server) as client:
            model = await client.model("smoke")
            assert [each.name for each in await client.models()] == ["smoke"]
            assert (model.digest, model.card) == (engine.digest, engine.card)
            assert np.array_equal(await model.sample(7, 100, 5), engine.sample(7, 100, 5))
            assert np.array_equal(await model.decode(draw(7, 100, 5, 8)), engine.sample(7, 100, 5))
            parts = [part async for part in model.stream(7, 90, 2000, temperature=0.7, priority="interactive")]
            assert np.array_equal(joined(parts), engine.sample(7, 90, 2000, 0.7))
            assert [part async for part in model.stream(7, 90, 0)] == list(engine.stream(7, 90, 0)) == []
            assert [index async for index, _ in model.files(7, 3, 4)] == [3, 4, 5, 6]
            many = await asyncio.gather(*(model.sample(seed, 0, 3) for seed in range(30)))
            assert all(np.array_equal(got, engine.sample(seed, 0, 3)) for seed, got in enumerate(many))
            with pytest.raises(Rejected, match="count must be whole numbers from 0"):
                await model.sample(0, 0, -1)

    asyncio.run(use())


def test_decode_gives_the_pictures_of_ones_own_noise(server: str, engine: Engine) -> None:
    noise = draw(7, 100, 40, 8)
    with Client(server) as client:
        model = client.model()
        assert np.array_equal(model.decode(noise), engine.decode(noise))
        assert np.array_equal(model.decode(noise.tolist()), engine.decode(noise))
        assert np.array_equal(model.decode(noise[::2]), engine.decode(np.ascontiguousarray(noise[::2])))
        for wrong, words in (
            (np.zeros((2, 9)), "shape"),
            (np.zeros(8), "shape"),
            ([["a"] * 8], "numbers"),
            ([[0] * 8, [0] * 7], "numbers"),
            (None, "noise must"),
            (np.full((1, 8), np.inf), "finite"),
            (np.full((1, 8), -1001.0), "within 1000"),
        ):
            with pytest.raises(Rejected, match=words):
                model.decode(wrong)


@contextmanager
def cut_after(address: str, most: int) -> Iterator[str]:
    """A port that leads to the server and breaks each of its first connections after so many bytes."""
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    cuts = iter(range(3))

    def copy(source: socket.socket, target: socket.socket, left: int | None) -> None:
        with suppress(OSError):  # the other side was cut
            while data := source.recv(1 << 16):
                target.sendall(data)
                if left is not None and (left := left - len(data)) < 0:
                    break
        for end in (source, target):
            with suppress(OSError):  # it was shut already
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection((host, int(port)))
            limit = most if next(cuts, None) is not None else None
            threading.Thread(target=copy, args=(near, far, None), daemon=True).start()
            threading.Thread(target=copy, args=(far, near, limit), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_a_stream_that_breaks_goes_on_where_it_stopped(server: str, engine: Engine) -> None:
    with cut_after(server, 3_000_000) as address, Client(address) as client:
        parts = list(client.model().stream(3, 10, 15_000))
        assert [start for start, _ in parts] == [10 + at for at in np.cumsum([0, *(len(x) for _, x in parts[:-1])])]
        assert np.array_equal(joined(parts), engine.sample(3, 10, 15_000))

    async def use(address: str) -> Images:
        async with AsyncClient(address) as client:
            return joined([part async for part in (await client.model()).stream(3, 10, 15_000)])

    with cut_after(server, 3_000_000) as address:
        assert np.array_equal(asyncio.run(use(address)), engine.sample(3, 10, 15_000))


class Sender(rpc.SamplingServiceServicer):
    """A server that sends a stream's chunks, all of them or but the last ones, and ends it as it is told."""

    def __init__(self, engine: Engine, end: Callable[[grpc.ServicerContext], object], short_by: int = 0) -> None:
        self.engine, self.end, self.short_by = engine, end, short_by
        self.asked: list[tuple[int, int]] = []

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> wire.GetModelResponse:  # noqa: N802
        card = self.engine.card.to_json()
        model = wire.Model(name="smoke", version="1", digest=self.engine.digest, card=card, max_count=100)
        return wire.GetModelResponse(model=model)

    def SampleStream(  # noqa: N802
        self, request: wire.SampleStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.SampleStreamResponse]:
        wanted = request.range
        self.asked.append((wanted.start, wanted.count))
        if not wanted.count:  # as every server does
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "count must be 1 or more")
        for start, images in self.engine.stream(wanted.seed, wanted.start, wanted.count - self.short_by):
            count, height, width, channels = images.shape
            chunk = wire.Chunk(start=start, count=count, height=height, width=width, channels=channels)
            chunk.digest, chunk.pixels = self.engine.digest, images.tobytes()
            yield wire.SampleStreamResponse(chunk=chunk)
        self.end(context)


@contextmanager
def sending(sender: Sender) -> Iterator[tuple[str, grpc.Server]]:
    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_SamplingServiceServicer_to_server(sender, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", server
    server.stop(0).wait()


def blocking(address: str, after: Callable[[], object] = lambda: None) -> list[tuple[int, Images]]:
    """Read samples 10 to 109, and call `after` once all are here."""
    parts: list[tuple[int, Images]] = []
    with Client(address) as client:
        for part in client.model().stream(3, 10, 100):
            parts.append(part)
            if part[0] + len(part[1]) == 110:
                after()
    return parts


def by_asyncio(address: str, after: Callable[[], object] = lambda: None) -> list[tuple[int, Images]]:
    async def use() -> list[tuple[int, Images]]:
        parts: list[tuple[int, Images]] = []
        async with AsyncClient(address) as client:
            async for part in (await client.model()).stream(3, 10, 100):
                parts.append(part)
                if part[0] + len(part[1]) == 110:
                    await asyncio.to_thread(after)
        return parts

    return asyncio.run(use())


@pytest.mark.parametrize("read", [blocking, by_asyncio])
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
def test_a_stream_that_is_complete_never_fails(
    engine: Engine, read: Callable[..., list[tuple[int, Images]]], code: grpc.StatusCode
) -> None:
    sender = Sender(engine, lambda context: context.abort(code, "after the last chunk"))
    with sending(sender) as (address, _):
        assert np.array_equal(joined(read(address)), engine.sample(3, 10, 100))
    assert sender.asked == [(10, 100)]


@pytest.mark.parametrize("read", [blocking, by_asyncio])
def test_a_server_may_go_once_it_has_sent_all(engine: Engine, read: Callable[..., list[tuple[int, Images]]]) -> None:
    gone = threading.Event()
    sender = Sender(engine, lambda context: gone.wait(60))
    with sending(sender) as (address, server):
        parts = read(address, lambda: server.stop(0))
        gone.set()
        assert np.array_equal(joined(parts), engine.sample(3, 10, 100))
    assert sender.asked == [(10, 100)]


@pytest.mark.parametrize("read", [blocking, by_asyncio])
def test_a_stream_that_ends_early_is_no_success(engine: Engine, read: Callable[..., list[tuple[int, Images]]]) -> None:
    with (
        sending(Sender(engine, lambda context: None, short_by=7)) as (address, _),
        pytest.raises(Broken, match="7 of 100 samples"),
    ):
        read(address)


def test_a_server_that_is_killed_and_comes_back_is_waited_for(smoke_bundle: Path, engine: Engine) -> None:
    address = free_address()
    with serving("--model", smoke_bundle, "--listen", address) as (_, first), Client(address) as client:
        stream = client.model().stream(3, 0, 20_000)
        parts = [next(stream)]
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        with serving("--model", smoke_bundle, "--listen", address):
            parts += list(stream)
        assert np.array_equal(joined(parts), engine.sample(3, 0, 20_000))


def test_another_model_never_finishes_what_one_began(smoke_bundle: Path, tmp_path: Path) -> None:
    address = free_address()
    other = smoke_bundle.read_bytes() + b"\x32\x00"  # an empty doc string: the same pictures, another file
    path = tmp_path / "smoke.onnx"
    path.write_bytes(other)
    with serving("--model", smoke_bundle, "--listen", address) as (_, first), Client(address) as client:
        stream = client.model().stream(3, 0, 2**40)
        next(stream)
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        with serving("--model", path, "--listen", address), pytest.raises(Changed, match="changed the model smoke"):
            list(stream)


def test_what_is_not_there_is_said_at_once(server: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address) as client, pytest.raises(Unreachable, match="start one with"):
            client.models()
    with Client(server) as client, pytest.raises(Rejected, match="no model 'cats'"):
        client.model("cats")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and never says a word
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, Options(timeout=0.5)) as client, pytest.raises((TimedOut, Unreachable)):
            client.models()
    with pytest.raises(RemoteError, match="cannot read"):
        Client(server, Options(ca=Path("/absent.pem")))


def uses(model: Any, client: Any) -> dict[str, Callable[[], Any]]:
    return {
        "sample": lambda: model.sample(0, 0, 3),
        "decode": lambda: model.decode(draw(0, 0, 3, 8)),
        "stream": lambda: model.stream(0, 0, 3),
        "files": lambda: model.files(0, 0, 3),
        "models": lambda: client.models(),
        "model": lambda: client.model("smoke"),
    }


@pytest.mark.parametrize("use", ["sample", "decode", "stream", "files", "models", "model"])
def test_a_client_that_is_closed_says_so(server: str, use: str) -> None:
    with Client(server) as client:
        model = client.model()
    client.close()
    with pytest.raises(Closed, match=f"the client of {server} is closed"):
        list(uses(model, client)[use]())

    async def asynchronously() -> None:
        async with AsyncClient(server) as client:
            model = await client.model()
        await client.close()
        got = uses(model, client)[use]()
        with pytest.raises(Closed, match=f"the client of {server} is closed"):
            await (got if isinstance(got, Awaitable) else anext(got))

    asyncio.run(asynchronously())


def test_closing_ends_what_is_under_way(server: str, engine: Engine) -> None:
    """Whoever reads a stream, waits for a chunk, or waits for the server to come back, hears of it."""
    client = Client(server)
    stream = client.model().stream(0, 0, 2**40)
    next(stream)
    closer = threading.Thread(target=client.close)
    closer.start()
    with pytest.raises(Closed):
        list(stream)
    closer.join()

    asleep = threading.Event()
    with sending(Sender(engine, lambda context: asleep.wait(60), short_by=7)) as (address, _):
        client = Client(address)
        parts = client.model().stream(3, 10, 100)
        for start, images in parts:  # the server sends no more, and does not end the stream
            if start + len(images) == 103:
                threading.Timer(0.2, client.close).start()
                break
        with pytest.raises(Closed):
            next(parts)
        asleep.set()

    with sending(Sender(engine, lambda context: None)) as (address, lost):
        client = Client(address)
        model = client.model()
        lost.stop(0).wait()
        threading.Timer(0.2, client.close).start()
        with pytest.raises(Closed):
            model.sample(0, 0, 1)


def test_closing_ends_what_is_under_way_in_asyncio(server: str, engine: Engine) -> None:
    asleep = threading.Event()

    async def read(stream: AsyncIterator[tuple[int, Images]]) -> None:
        async for _ in stream:
            pass

    async def close_soon(client: AsyncClient, task: asyncio.Task[Any]) -> None:
        await asyncio.wait([task], timeout=0.2)
        assert not task.done()
        await client.close()
        with pytest.raises(Closed):
            await task

    async def use(address: str, lost: grpc.Server) -> None:
        client = AsyncClient(server)
        stream = (await client.model()).stream(0, 0, 2**40)
        await anext(stream)
        await client.close()
        with pytest.raises(Closed):
            await read(stream)

        client = AsyncClient(server)
        stream = (await client.model()).stream(0, 0, 2**40)
        await close_soon(client, asyncio.create_task(read(stream)))

        client = AsyncClient(address)
        stream = (await client.model()).stream(3, 10, 100)
        await close_soon(client, asyncio.create_task(read(stream)))

        client = AsyncClient(address)
        stream = (await client.model()).stream(3, 10, 100)
        task = asyncio.create_task(read(stream))
        await asyncio.wait([task], timeout=0.2)
        task.cancel()  # by its owner: that stays what it is
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

        client = AsyncClient(address)
        model = await client.model()
        await asyncio.to_thread(lost.stop(0).wait)
        await close_soon(client, asyncio.create_task(model.sample(0, 0, 1)))

    with sending(Sender(engine, lambda context: asleep.wait(60), short_by=7)) as (address, lost):
        asyncio.run(asyncio.wait_for(use(address, lost), 100))
        asleep.set()


@pytest.mark.parametrize(("seed", "start", "count"), [(-1, 0, 1), (2**64, 0, 1), (0, -1, 1), (0, 2**64, 1), (0, 0, -1)])
def test_numbers_that_no_message_holds(server: str, seed: int, start: int, count: int) -> None:
    with Client(server) as client, pytest.raises(Rejected, match="whole numbers"):
        client.model().sample(seed, start, count)


def test_words_that_mean_nothing(server: str) -> None:
    with Client(server) as client:
        with pytest.raises(Rejected, match="encoding and priority must be among raw, png"):
            list(client.model().files(0, 0, 1, encoding="gif"))  # type: ignore[arg-type]
        with pytest.raises(Rejected, match="interactive, bulk"):
            client.model().sample(0, 0, 1, priority="first")  # type: ignore[arg-type]
        with pytest.raises(Rejected, match="interactive, bulk"):
            client.model().decode(np.zeros((1, 8)), priority="first")  # type: ignore[arg-type]
        with pytest.raises(Rejected, match="whole numbers"):
            client.model().sample(0, 0.5, 1)  # type: ignore[arg-type]


def test_every_error_is_a_remote_error_and_in_the_hierarchys_drawing() -> None:
    kinds = [each for each in vars(names).values() if isinstance(each, type) and issubclass(each, ServeError)]
    assert {Broken, Changed, Rejected, TimedOut, Unreachable} < set(kinds)
    for kind in kinds:
        assert kind.__name__ in (names.__doc__ or "")
        assert kind is ServeError or kind.__bases__[0] in (ServeError, RemoteError)
