"""Devices: how they are named, which there are, what each is told, and what it says when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve import Engine, EngineError, load, openvino
from serve.bundle import EMBEDDED
from serve.devices import NVIDIA_DRIVER, Device, candidates, parse, providers, refused
from tests.conftest import assert_clear_error, command


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
    """By OpenVINO only for what it alone has."""
    here = "cuda:0" if NVIDIA_DRIVER.exists() else "cpu"
    assert Engine(load(smoke_bundle)).device == here
    assert Engine(load(EMBEDDED["int8"]), arithmetic="fast", batch=1).device == here
    if here == "cpu" and openvino.has_bfloat16():
        here = "openvino"
    assert Engine(load(smoke_bundle), arithmetic="fast").device == here


@pytest.mark.parametrize("has", [True, False])
def test_auto_takes_openvino_for_bfloat16_alone(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: has)
    assert [str(each) for each in candidates("auto")] == ["cuda:0", "cpu"]
    assert [str(each) for each in candidates("auto", "fast", "int8")] == ["cuda:0", "cpu"]
    assert [str(each) for each in candidates("auto", "fast")] == ["cuda:0", *["openvino"] * has, "cpu"]


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
def test_too_little_memory_says_what_helps(said: str) -> None:
    """A smaller batch does on a processor; a GPU has one size of batches."""
    message = str(refused(RuntimeError(said), Device("cuda", 1), "it failed"))
    assert message == "the cuda:1 device is out of memory; free memory on it, or pass --device cpu"
    assert "choose a smaller batch, or free memory" in str(refused(RuntimeError(said), Device("cpu"), "it failed"))


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
