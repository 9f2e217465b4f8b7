"""One interface: whatever can be sampled takes, gives and refuses the same, in this process and from a server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image

import serve
from serve import AsyncClient, AsyncModel, Client, Engine, Fleet, GenerativeModel, RemoteError, load
from serve import errors as homes
from serve.model import Images
from serve.noise import draw

WHOLE = (
    "seed, start and count must be whole numbers from 0, seed below 2^64, and start + count 2^63 or less. Received: "
)
MEMBERS = ("card", "digest", "arithmetic", "name", "batch", "sample", "pictures", "decode", "stream")


class Awaited:
    """A model for asyncio, each of whose calls is awaited."""

    def __init__(self, model: AsyncModel, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.model, self.wait = model, wait
        self.card, self.digest, self.arithmetic = model.card, model.digest, model.arithmetic
        self.name, self.batch = model.name, model.batch

    def sample(self, *arguments: Any, **more: Any) -> Images:
        return self.wait(self.model.sample(*arguments, **more))

    def pictures(self, *arguments: Any, **more: Any) -> list[Image]:
        return self.wait(self.model.pictures(*arguments, **more))

    def decode(self, noise: Any) -> Images:
        return self.wait(self.model.decode(noise))

    def stream(self, *arguments: Any, **more: Any) -> Iterator[tuple[int, Images]]:
        async def parts() -> list[tuple[int, Images]]:
            return [part async for part in self.model.stream(*arguments, **more)]

        return iter(self.wait(parts()))


@contextmanager
def engine(bundle: Path, server: str) -> Iterator[GenerativeModel]:
    yield Engine(load(bundle), batch=12)


@contextmanager
def remote(bundle: Path, server: str) -> Iterator[GenerativeModel]:
    with Client(server) as client:
        yield client.model()


@contextmanager
def awaited(bundle: Path, server: str) -> Iterator[GenerativeModel]:
    with asyncio.Runner() as runner:

        async def opened() -> AsyncClient:
            return AsyncClient(server)

        client = runner.run(opened())
        yield Awaited(runner.run(client.model()), runner.run)
        runner.run(client.close())


@contextmanager
def fleet(bundle: Path, server: str) -> Iterator[GenerativeModel]:
    with Fleet([server, server]) as servers:
        yield servers.model()


@pytest.fixture(scope="module", params=[engine, remote, awaited, fleet], ids=lambda made: made.__name__)
def model(request: pytest.FixtureRequest, smoke_bundle: Path, server: str) -> Iterator[GenerativeModel]:
    with request.param(smoke_bundle, server) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(smoke_bundle: Path) -> Callable[..., Images]:
    return Engine(load(smoke_bundle), batch=32).sample


def test_it_has_every_member(model: GenerativeModel, smoke_bundle: Path) -> None:
    assert isinstance(model, GenerativeModel)
    bundle = load(smoke_bundle)
    assert (model.card, model.digest, model.name) == (bundle.card, bundle.digest, "smoke")
    assert model.arithmetic == "exact"
    assert model.batch >= 1
    listed = {name for name in dir(GenerativeModel) if not name.startswith("_")} | {*GenerativeModel.__annotations__}
    assert listed == set(MEMBERS)


@pytest.mark.parametrize("beyond", [False, True])
def test_sample_takes_any_count(model: GenerativeModel, wanted: Callable[..., Images], beyond: bool) -> None:
    count = model.batch + 3 if beyond else 5
    images = model.sample(seed=7, start=100, count=count, temperature=0.7)
    assert np.array_equal(images, wanted(7, 100, count, 0.7))
    assert images.dtype == np.uint8


def test_pictures_are_pillows(model: GenerativeModel) -> None:
    pictures = model.pictures(seed=7, start=100, count=3, temperature=0.7)
    assert [(each.size, each.mode) for each in pictures] == [((16, 16), "RGB")] * 3
    assert np.array_equal([np.asarray(each) for each in pictures], model.sample(7, 100, 3, 0.7))
    assert model.pictures(seed=7, start=0, count=0) == []


def test_none_are_an_empty_array(model: GenerativeModel) -> None:
    for images in (model.sample(seed=7, start=2**63, count=0), model.decode(np.zeros((0, 8)))):
        assert (images.shape, images.dtype) == ((0, *model.card.image_shape), np.uint8)
    assert list(model.stream(seed=7, start=0, count=0)) == []


def test_numpys_numbers_are_numbers(model: GenerativeModel, wanted: Callable[..., Images]) -> None:
    images = model.sample(np.uint64(2**64 - 1), np.int64(3), np.int32(2), np.float32(0.5))
    assert np.array_equal(images, wanted(2**64 - 1, 3, 2, 0.5))
    # Whose sum they cannot hold.
    start, count = np.int32(2**31 - 5), np.int32(10)
    assert np.array_equal(model.sample(7, start, count), wanted(7, 2**31 - 5, 10))
    parts = [images for _, images in model.stream(7, start, count)]
    assert np.array_equal(np.concatenate(parts), wanted(7, 2**31 - 5, 10))


def test_decode_takes_any_noise(model: GenerativeModel, wanted: Callable[..., Images]) -> None:
    count = model.batch + 3
    noise = draw(7, 100, count, 8)
    assert np.array_equal(model.decode(noise), wanted(7, 100, count))
    assert np.array_equal(model.decode(noise[:4].astype(np.float64).tolist()), wanted(7, 100, 4))
    assert np.array_equal(model.decode(noise[:8:2]), wanted(7, 100, 8)[::2])


def test_a_stream_is_the_range_in_order(model: GenerativeModel, wanted: Callable[..., Images]) -> None:
    parts = list(model.stream(seed=4, start=10, count=2000, temperature=0.7))
    assert [start for start, _ in parts] == [10, *(10 + np.cumsum([len(images) for _, images in parts[:-1]]))]
    assert np.array_equal(np.concatenate([images for _, images in parts]), wanted(4, 10, 2000, 0.7))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 1), WHOLE),
        ((2**64, 0, 1), WHOLE),
        ((0.5, 0, 1), WHOLE),
        ((0, -1, 1), WHOLE),
        ((0, 0, -1), WHOLE),
        ((0, 2**63, 1), WHOLE),
        ((None, 0, 1), WHOLE),
        ((0, 0, 1, -1), "temperature must be from 0 to 100. Received: -1"),
        ((0, 0, 1, 101), "temperature must be from 0 to 100"),
        ((0, 0, 1, float("nan")), "temperature must be from 0 to 100. Received: nan"),
        ((0, 0, 1, "hot"), "temperature must be from 0 to 100. Received: hot"),
    ],
)
def test_wrong_arguments_are_the_same_value_error(model: GenerativeModel, arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        model.sample(*arguments)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        list(model.stream(*arguments))


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (np.zeros((2, 9)), "noise must have the shape [n, 8]. Received: [2, 9]"),
        (np.zeros(8), "noise must have the shape [n, 8]. Received: [8]"),
        ([["a"] * 8], "noise must be numbers of the shape [n, 8]"),
        (np.full((1, 8), np.nan), "noise must be finite and within 1000 of 0"),
        (np.full((1, 8), -1001.0), "noise must be finite and within 1000 of 0. Received: 1001.0"),
    ],
)
def test_wrong_noise_is_the_same_value_error(model: GenerativeModel, noise: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        model.decode(noise)


def test_a_clients_value_errors_are_remote_errors_too(server: str) -> None:
    with Client(server) as client, pytest.raises(RemoteError, match="temperature"):
        client.model().sample(0, 0, 1, -1)


def test_all_errors_are_exported_and_stand_in_the_tree() -> None:
    kinds = [kind for kind in vars(homes).values() if isinstance(kind, type) and issubclass(kind, homes.ServeError)]
    assert all(getattr(serve, kind.__name__) is kind for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(serve.__all__)
    tree, above = [], [(-1, "Exception")]
    for indent, name in re.findall(r"^( *)([A-Z]\w+)(?:  |$)", str(homes.__doc__), re.M):
        while above[-1][0] >= len(indent):
            above.pop()
        tree.append((name, above[-1][1]))
        above.append((len(indent), name))
    assert sorted(tree) == sorted((kind.__name__, kind.__bases__[0].__name__) for kind in kinds)
