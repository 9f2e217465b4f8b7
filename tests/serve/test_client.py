"""The client when things go wrong: what it asks for again, where it goes on, what it says."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from serve import AsyncClient, Client, Engine, Options, RemoteError, load
from serve import errors as names
from serve.engine import Images
from serve.errors import Broken, Changed, Rejected, ServeError, TimedOut, Unreachable
from serve.noise import draw
from tests.conftest import serving


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle), device="cpu")


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
            assert [index async for index, _ in model.files(7, 3, 4)] == [3, 4, 5, 6]
            many = await asyncio.gather(*(model.sample(seed, 0, 3) for seed in range(30)))
            assert all(np.array_equal(got, engine.sample(seed, 0, 3)) for seed, got in enumerate(many))
            with pytest.raises(Rejected, match="count must be 1 or more"):
                await model.sample(0, 0, 0)

    asyncio.run(use())


def test_decode_gives_the_pictures_of_ones_own_noise(server: str, engine: Engine) -> None:
    noise = draw(7, 100, 40, 8)
    with Client(server) as client:
        model = client.model()
        assert np.array_equal(model.decode(noise), engine.run(noise))
        assert np.array_equal(model.decode(noise.tolist()), engine.run(noise))
        assert np.array_equal(model.decode(noise[::2]), engine.run(np.ascontiguousarray(noise[::2])))
        for wrong, words in (
            (np.zeros((2, 9)), "shape"),
            (np.zeros(8), "shape"),
            (np.full((1, 8), np.inf), "finite"),
            (np.full((1, 8), -1001.0), "within 1000"),
            (np.zeros((0, 8)), "1 to"),
            (np.zeros((model.batch + 1, 8)), "1 to"),
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


def test_a_server_that_is_killed_and_comes_back_is_waited_for(smoke_bundle: Path, engine: Engine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with serving("--model", smoke_bundle, "--listen", address) as (_, first), Client(address) as client:
        stream = client.model().stream(3, 0, 20_000)
        parts = [next(stream)]
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        with serving("--model", smoke_bundle, "--listen", address):
            parts += list(stream)
        assert np.array_equal(joined(parts), engine.sample(3, 0, 20_000))


def test_another_model_never_finishes_what_one_began(smoke_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    other = smoke_bundle.read_bytes() + b"\x32\x00"  # an empty doc string: the same pictures, another file
    path = smoke_bundle.with_name("other.onnx")
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


def test_every_error_is_a_remote_error_and_in_the_hierarchys_drawing() -> None:
    kinds = [each for each in vars(names).values() if isinstance(each, type) and issubclass(each, ServeError)]
    assert {Broken, Changed, Rejected, TimedOut, Unreachable} < set(kinds)
    for kind in kinds:
        assert kind.__name__ in (names.__doc__ or "")
        assert kind is ServeError or kind.__bases__[0] in (ServeError, RemoteError)
