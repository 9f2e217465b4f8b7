"""Engines on a GPU, where there is one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from serve import Engine, load
from serve.bundle import EMBEDDED
from serve.devices import NVIDIA_DRIVER, Device, providers, runtime


@pytest.fixture(scope="module")
def faces() -> Engine:
    return Engine(load(), device="cpu", batch=8)


def _need(kind: str) -> None:
    """Skip where there is nothing to run on; what is there has to work."""
    name = providers(Device(kind), [8], 64, Path())[0][0]
    if not NVIDIA_DRIVER.exists() or name not in runtime().get_available_providers():
        pytest.skip(f"needs an NVIDIA GPU and {name}")
    if kind == "tensorrt" and not find_spec("tensorrt"):
        pytest.skip("needs the package tensorrt-cu13")


@pytest.fixture(scope="module", params=["cuda", "tensorrt"])
def gpu(request: pytest.FixtureRequest) -> Engine:
    _need(request.param)
    return Engine(load(), device=request.param, batch=32)


def test_a_gpu_gives_the_cpus_pictures_to_a_grey_level(gpu: Engine, faces: Engine) -> None:
    apart = np.abs(gpu.sample(5, 0, 100).astype(int) - faces.sample(5, 0, 100))
    assert apart.max() <= 1


def test_a_gpus_samples_do_not_depend_on_the_batch(gpu: Engine) -> None:
    whole = gpu.sample(5, 0, 70)
    for at, count in ((0, 1), (3, 8), (11, 9), (69, 1)):
        assert np.array_equal(gpu.sample(5, at, count), whole[at : at + count])


def test_a_gpus_images_stay_as_they_were_handed_out(gpu: Engine) -> None:
    first = gpu.sample(5, 0, 8)
    kept = first.copy()
    gpu.sample(5, 100, 8)
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("precision", list(EMBEDDED))
def test_a_gpus_fast_samples_are_near_the_exact_ones_in_any_batch(precision: str) -> None:
    _need("cuda")
    bundle = load(EMBEDDED[precision])
    exact, fast, less = (
        Engine(bundle, "cuda", batch=batch, arithmetic=arithmetic)
        for batch, arithmetic in ((256, "exact"), (256, "fast"), (20, "fast"))
    )
    assert fast.arithmetic == "float16"
    whole = fast.sample(5, 0, 300)
    assert np.array_equal(less.sample(5, 0, 300), whole)
    assert np.array_equal(fast.sample(5, 77, 1)[0], whole[77])
    assert np.abs(whole.astype(int) - exact.sample(5, 0, 300)).mean() < 1


def test_cuda_graphs_give_the_same_bytes_from_any_thread() -> None:
    _need("cuda")
    plain, graphs = (Engine(load(), device="cuda", batch=32, cuda_graphs=on) for on in (False, True))
    assert graphs.buckets == plain.buckets
    starts = range(0, 200, 20)
    with ThreadPoolExecutor(4) as pool:
        replayed = list(pool.map(lambda at: graphs.sample(5, at, 20), starts))
    assert np.array_equal(np.concatenate(replayed), plain.sample(5, 0, 200))
