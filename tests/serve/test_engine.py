"""A bundle on a device: the same sample whatever shares its batch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import Engine, EngineError, load
from tests.conftest import assert_clear_error, command


@pytest.fixture(scope="module")
def engines(smoke_bundle: Path) -> list[Engine]:
    return [
        Engine(load(smoke_bundle), device="cpu", batch=batch, threads=threads) for batch, threads in ((32, 0), (5, 1))
    ]


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


def test_they_are_pictures_and_not_all_the_same() -> None:
    images = Engine(load(), device="cpu").sample(0, 0, 16)
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


def test_a_device_that_is_not_there_says_what_to_install(smoke_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"balanced-vae\[gpu\]"):
        Engine(load(smoke_bundle), device="cuda")
    result = command("sample-cli", "--n", 1, "--out", tmp_path / "x", "--device", "openvino", "--model", smoke_bundle)
    assert_clear_error(result, "balanced-vae[openvino]", "--device cpu")
