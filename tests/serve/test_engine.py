"""A bundle on a device: the same sample whatever shares its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from serve import Engine, EngineError, load
from serve.buckets import Buckets, reference, sizes
from serve.bundle import Bundle, check, metadata
from serve.card import Card
from serve.devices import Device, open_session, providers, runtime
from serve.engine import Binding
from serve.model import Images
from serve.noise import Noise, draw
from tests.conftest import assert_clear_error, command


@pytest.fixture(scope="module")
def engines(smoke_bundle: Path) -> list[Engine]:
    return [
        Engine(load(smoke_bundle), device="cpu", batch=batch, threads=threads) for batch, threads in ((32, 0), (5, 1))
    ]


@pytest.fixture(scope="module")
def faces() -> Engine:
    return Engine(load(), device="cpu", batch=8)


@given(cuts=st.lists(st.integers(0, 80), max_size=5), seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_samples_do_not_depend_on_requests_batches_or_threads(
    engines: list[Engine], cuts: list[int], seed: int, start: int
) -> None:
    whole = engines[0].sample(seed, start, 80)
    edges = [0, *sorted(cuts), 80]
    for engine in engines:
        parts = [engine.sample(seed, start + a, b - a) for a, b in pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_the_embedded_faces_do_not_depend_on_the_batch_either() -> None:
    large, small = Engine(load(), device="cpu", batch=32), Engine(load(), device="cpu", batch=3, threads=1)
    whole = large.sample(7, 90, 40)
    assert np.array_equal(whole[10:15], large.sample(7, 100, 5))
    assert np.array_equal(whole[10:15], small.sample(7, 100, 5))


def test_they_are_pictures_and_not_all_the_same(faces: Engine) -> None:
    images = faces.sample(0, 0, 16)
    assert images.shape == (16, 64, 64, 3)
    assert images.dtype == np.uint8
    assert images.std(axis=0).mean() > 20  # grey levels between faces
    assert 60 < images.mean() < 190


def test_temperature_zero_is_one_picture(engines: list[Engine]) -> None:
    images = engines[0].sample(1, 0, 4, temperature=0.0)
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(engines[0].sample(1, 0, 4)[0], images[0])


def test_a_stream_is_the_range_in_order(engines: list[Engine]) -> None:
    parts = list(engines[1].stream(4, 10, 23))
    assert [start for start, _ in parts] == [10, 15, 20, 25, 30]
    assert np.array_equal(np.concatenate([images for _, images in parts]), engines[0].sample(4, 10, 23))


def test_the_buckets_grow_from_what_a_device_can_use_to_the_batch() -> None:
    assert sizes(Device("cpu"), 32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert sizes(Device("cpu"), 5) == [1, 2, 3, 4, 5]
    assert sizes(Device("openvino"), 1) == [1]
    for kind, batch in (("cuda", 0), ("cuda", 300), ("tensorrt", 8)):  # on a GPU there is one for all
        assert sizes(Device(kind), batch) == [reference(Device(kind))]


def test_a_short_batch_takes_a_small_bucket(faces: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faces.buckets == [1, 2, 3, 4, 6, 8]
    ran: list[int] = []
    monkeypatch.setattr(faces, "_runs", {size: _told(ran, size, run) for size, run in faces._runs.items()})
    for rows in (1, 2, 3, 5, 8):
        assert len(faces.compute(draw(0, 0, rows, faces.card.noise_size))) == rows
    assert ran == [1, 2, 3, 6, 8]


def _told(ran: list[int], size: int, run: Callable[..., Images]) -> Callable[..., Images]:
    def told(noise: np.ndarray) -> Images:
        assert len(noise) == size
        ran.append(size)
        return run(noise)

    return told


def test_images_stay_as_they_were_handed_out(faces: Engine) -> None:
    first = faces.compute(draw(0, 0, 3, faces.card.noise_size))
    kept = first.copy()
    faces.compute(draw(0, 50, 3, faces.card.noise_size))
    assert np.array_equal(first, kept)


def test_noise_of_another_kind_is_refused(faces: Engine) -> None:
    noise = draw(0, 0, 9, faces.card.noise_size)
    for wrong in (noise, noise[:0], noise[:2].astype(np.float64), noise[:2, 1:], noise[0]):
        with pytest.raises(ValueError, match=r"float32 \[1 to 8, 64\]. Received: float"):
            faces.compute(wrong)
    assert faces.decode(noise[:0]).shape == (0, 64, 64, 3)
    assert len(faces.decode(noise)) == 9


def test_threads_may_compute_together(faces: Engine) -> None:
    noises = [draw(3, at, 2, faces.card.noise_size) for at in range(0, 16, 2)]
    wanted = [faces.compute(noise) for noise in noises]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(faces.compute, noises), wanted))


# Graphs that break the noise contract.


def _bundle(*nodes: onnx.NodeProto, grid: tuple[int, ...] = (-1, 2, 2, 1)) -> Bundle:
    """Return a bundle of 2x2 pictures, or so it says: 128 + 30 noise + [batch, 4] `extra`, which the nodes make."""
    scale = [numpy_helper.from_array(np.float32(value), name) for name, value in (("a", 30.0), ("b", 128.0))]
    shape = numpy_helper.from_array(np.array(grid), "shape")
    nodes += (
        helper.make_node("Mul", ["noise", "a"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["grey"]),
        helper.make_node("Add", ["grey", "extra"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Reshape", ["bytes", "shape"], ["images"]),
    )
    noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 4])
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 2, 2, 1])
    card = Card("drawn", (2, 2, 1), 4, 4, "normal", {"mode": "none"}, "fp32", {})
    graph = helper.make_graph(list(nodes), "g", [noise], [images], [*scale, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata(card))
    data = model.SerializeToString()
    return Bundle(data, check(data), hashlib.sha256(data).hexdigest())


def test_a_bucket_whose_samples_differ_is_not_used() -> None:
    size = [
        helper.make_node("Shape", ["noise"], ["batch_and_4"], end=1),
        helper.make_node("Cast", ["batch_and_4"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["most"], value_float=4.0),
        helper.make_node("Less", ["count", "most"], ["few"]),  # batches below 4 are a grey level brighter
        helper.make_node("Cast", ["few"], ["extra"], to=TensorProto.FLOAT),
    ]
    engine = Engine(_bundle(*size), device="cpu", batch=16)
    assert engine.buckets == [4, 6, 8, 12, 16]
    assert np.array_equal(engine.sample(0, 0, 1), engine.sample(0, 0, 16)[:1])


def test_the_largest_batch_changes_no_sample_even_where_batches_differ() -> None:
    for most in (1, 3, 5):  # batches below 4 and above 10 are a grey level brighter
        between = [
            helper.make_node("Shape", ["noise"], ["batch_and_4"], end=1),
            helper.make_node("Cast", ["batch_and_4"], ["count"], to=TensorProto.FLOAT),
            helper.make_node("Constant", [], ["middle"], value_float=7.0),
            helper.make_node("Sub", ["count", "middle"], ["off"]),
            helper.make_node("Abs", ["off"], ["far"]),
            helper.make_node("Constant", [], ["most"], value_float=3.5),
            helper.make_node("Greater", ["far", "most"], ["beyond"]),
            helper.make_node("Cast", ["beyond"], ["extra"], to=TensorProto.FLOAT),
        ]
        small, large = (Engine(_bundle(*between), device="cpu", batch=batch) for batch in (most, 32))
        assert large.buckets == [4, 6, 8]
        assert np.array_equal(small.sample(0, 0, 50), large.sample(0, 0, 50))


def test_a_comparison_that_failed_is_made_again() -> None:
    """As where memory was short for a moment: the sizes that give the same bytes are used all the same."""
    fail = iter([False, False, True])

    def run(noise: Noise, size: int) -> Images:
        if next(fail, False):
            raise MemoryError
        return np.zeros((len(noise), 1, 1, 1), np.uint8) + noise[:, :1, None, None].astype(np.uint8)

    tried = sizes(Device("cpu"), 32)
    buckets = Buckets(tried, 8, run, 8, "free")
    with pytest.raises(MemoryError):
        buckets.least(30)
    assert [buckets.least(rows) for rows in (1, 3, 9, 20, 30)] == [1, 3, 12, 24, 32]


def test_no_batch_is_smaller_than_none() -> None:
    for wrong in ({"batch": -1}, {"threads": -1}):
        with pytest.raises(EngineError, match="must be 0, for the device's own, or more"):
            Engine(load(), **wrong)


def test_a_graph_in_which_samples_see_each_other_is_refused() -> None:
    mean = helper.make_node("ReduceMean", ["noise"], ["mean"], keepdims=1)
    with pytest.raises(EngineError, match="depend on what shares their batch"):
        Engine(_bundle(mean, helper.make_node("Mul", ["mean", "a"], ["extra"])), device="cpu", batch=8)


@pytest.mark.parametrize("grid", [(-1, 2, 1, 1), (-1, 1, 4, 1), (1, -1, 2, 1), (-1, 4), (-1, 2, 2, 1, 1)])
def test_images_of_another_shape_than_the_cards_are_refused(grid: tuple[int, ...]) -> None:
    extra = helper.make_node("Sub", ["noise", "noise"], ["extra"])
    assert len(Engine(_bundle(extra), device="cpu", batch=8).sample(0, 0, 3)) == 3
    bundle = _bundle(extra, grid=grid)
    wanted = r"drawn should give uint8 \[8, 2, 2, 1\], as its card says. Received: uint8 \["
    with pytest.raises(EngineError, match=wanted):
        Engine(bundle, device="cpu", batch=8)


def test_commands_refuse_a_graph_that_gives_other_images_than_its_card_says(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(_bundle(helper.make_node("Sub", ["noise", "noise"], ["extra"]), grid=(-1, 2, 1, 1)).data)
    for words in (
        ("serve-vae", "--model", path, "--check"),
        ("sample-cli", "--model", path, "--n", 1, "--out", tmp_path / "out"),
        ("export-onnx", "diff", path, path),
    ):
        assert_clear_error(command(*words), "should give uint8", "as its card says")


# Binding, on the CPU as on a GPU.


def test_a_bound_session_gives_the_plain_ones_bytes_and_keeps_none_of_them() -> None:
    bundle, device, rows = load(), Device("cpu"), 3
    session = open_session(bundle.data, device, providers(device, [rows], 64, Path()), 1)
    make = runtime().OrtValue.ortvalue_from_shape_and_type
    binding = Binding(
        session, make([rows, 64], np.float32), make([rows, *bundle.card.image_shape], np.uint8), graph=rows
    )
    noises = [draw(0, at, rows, 64) for at in (0, 40, 80)]
    bound = [binding(noise) for noise in noises]
    for noise, images in zip(noises, bound, strict=True):
        assert np.array_equal(images, session.run(["images"], {"noise": noise})[0])
