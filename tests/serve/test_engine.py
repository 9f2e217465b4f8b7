"""A bundle on a device: the same sample whatever shares its batch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from serve import Engine, EngineError, load
from serve.buckets import reference, sizes
from serve.bundle import EMBEDDED, Bundle, check, metadata
from serve.card import Card
from serve.devices import AUTO, NVIDIA_DRIVER, Device, candidates, open_session, parse, providers, refused, runtime
from serve.engine import Binding
from serve.model import Images
from serve.noise import draw
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


def test_a_device_that_is_not_there_says_what_to_install(smoke_bundle: Path, tmp_path: Path) -> None:
    if NVIDIA_DRIVER.exists():
        pytest.skip("a GPU is there")
    for device, extra in (("cuda", r"pip install '\.\[gpu\]' in the checkout"), ("tensorrt:1", "tensorrt-cu13")):
        with pytest.raises(EngineError, match=extra):
            Engine(load(smoke_bundle), device=device)
    (tmp_path / "openvino.py").write_text("raise ImportError")
    words = ("sample-cli", "--n", 1, "--out", tmp_path / "x", "--device", "openvino", "--model", smoke_bundle)
    result = command(*words, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert_clear_error(result, "pip install '.[openvino]' in the checkout", "--device cpu")


# Devices and their options.


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu")),
        ("openvino", Device("openvino")),
        ("cuda", Device("cuda", 0)),
        ("cuda:1", Device("cuda", 1)),
        ("tensorrt:12", Device("tensorrt", 12)),
    ],
)
def test_a_device_is_named_by_kind_and_index(text: str, device: Device) -> None:
    assert parse(text) == device
    assert parse(str(device)) == device
    assert candidates(text) == [device]


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cuda:1٣"])
def test_what_names_no_device_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(EngineError, match="cuda:N") as caught:
        parse(text)
    assert f"Received: {text!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_prefers_a_gpu_and_ends_with_the_cpu(smoke_bundle: Path) -> None:
    assert [str(each) for each in candidates("auto")] == ["cuda:0", "openvino", "cpu"]
    assert Engine(load(smoke_bundle)).device.partition(":")[0] in AUTO


def test_gpus_compute_in_float32_and_leave_nothing_to_the_cpu(tmp_path: Path) -> None:
    cuda = providers(Device("cuda", 1), [8, 32], 64, tmp_path)
    assert [name for name, _ in cuda] == ["CUDAExecutionProvider"]
    assert cuda[0][1] == {
        "device_id": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "DEFAULT",
        "arena_extend_strategy": "kSameAsRequested",
    }
    graphs = providers(Device("cuda", 1), [8, 32], 64, tmp_path, cuda_graphs=True)
    assert graphs[0][1] == cuda[0][1] | {"enable_cuda_graph": "1"}

    tensorrt = providers(Device("tensorrt", 1), [8, 32], 64, tmp_path)
    assert [name for name, _ in tensorrt] == ["TensorrtExecutionProvider", *(name for name, _ in cuda)]
    assert tensorrt[1:] == cuda
    options = tensorrt[0][1]
    # Python's binding takes no other words for yes and no.
    assert options["trt_fp16_enable"] == "False"
    assert options["trt_profile_min_shapes"] == "noise:8x64"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "noise:32x64"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)


def test_other_kinds_have_one_provider(tmp_path: Path) -> None:
    assert providers(Device("cpu"), [1], 64, tmp_path) == [("CPUExecutionProvider", {})]


def test_the_buckets_grow_from_what_a_device_can_use_to_the_batch() -> None:
    assert sizes(Device("cpu"), 32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert sizes(Device("cpu"), 5) == [1, 2, 3, 4, 5]
    assert sizes(Device("openvino"), 1) == [1]
    for kind, batch in (("cuda", 0), ("cuda", 300), ("tensorrt", 8)):  # on a GPU there is one for all
        assert sizes(Device(kind), batch) == [reference(Device(kind))]


def test_cuda_graphs_need_a_gpu(smoke_bundle: Path) -> None:
    with pytest.raises(EngineError, match="CUDA graphs need a cuda device"):
        Engine(load(smoke_bundle), device="cpu", cuda_graphs=True)


# Errors: what runtimes have been seen to say, and what becomes of it.


@pytest.mark.parametrize(
    "said",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node.\n"
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 939524096",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
        "std::bad_alloc",
    ],
)
def test_too_little_memory_says_to_lower_the_batch(said: str) -> None:
    message = str(refused(RuntimeError(said), Device("cuda", 1), "it failed"))
    assert message == "the cuda:1 device is out of memory; choose a smaller batch, or free memory on it"


def test_other_failures_are_one_line_without_the_runtimes_insides() -> None:
    said = (
        "/src/cuda_provider_info.cc:63 static FromProviderOptions(const T&) [ONNXRuntimeError] : 1 : FAIL : Parse "
        "Failed: CUDA failure 36: API call is not supported ; GPU=-1 ;\n hostname=vm ; expr=cudaGetDeviceCount(&n);"
    )
    message = str(refused(RuntimeError(said), Device("cuda"), "it failed"))
    assert message == "it failed: CUDA failure 36: API call is not supported; or pass --device cpu"
    said = "[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model.\n" + "x" * 5000
    message = str(refused(RuntimeError(said), Device("cpu"), "it failed"))
    assert message.startswith("it failed: This is an invalid model. xxx")
    assert len(message) < 400


def test_a_machine_with_too_little_memory_says_so() -> None:
    script = (
        "import re, resource; from serve import Engine, load; Engine(load(), 'cpu', batch=1);"
        "used = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2);"
        "Engine(load(), 'cpu', batch=512).sample(0, 0, 512)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's /proc")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "EngineError: the cpu device is out of memory; choose a smaller batch" in result.stderr.splitlines()[-1]


# What one run may rely on.


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


# On a GPU, where there is one.


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
