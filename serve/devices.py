"""Devices, the arithmetic that each has, and how a bundle's bytes become an ONNX Runtime session on one.

Providers are configured for samples that do not change with the batch, the process or the machine: no autotuning that
times kernels where that can be helped and, unless fast arithmetic is asked for, no TF32 and no float16. The reason for
each option stands beside it. OpenVINO, which is no provider of ONNX Runtime's here, is in `serve.openvino`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from serve import openvino
from serve.errors import EngineError
from serve.half import halved
from serve.model import EXACT
from serve.pads import symmetric

FORMS = "auto, cpu, openvino, cuda, cuda:N, tensorrt or tensorrt:N"
NEEDS = {
    "cuda": "NVIDIA's driver and pip install '.[gpu]' in the checkout",
    "tensorrt": "NVIDIA's driver and pip install '.[gpu]' 'tensorrt-cu13<11' in the checkout",
    "openvino": "pip install '.[openvino]' in the checkout",
}
NVIDIA_DRIVER = Path("/dev/nvidiactl")
FLOAT16 = "float16"
MOST_REASON = 300  # characters of a runtime's message that are passed on

Providers = list[tuple[str, dict[str, str]]]
CPU_PROVIDERS: Providers = [("CPUExecutionProvider", {})]
GPU_SETTINGS = {
    # What a GPU has no kernel for is an error. The runtime would run it on the CPU, without a word.
    "session.disable_cpu_ep_fallback": "1",
    # CUDA cannot widen the 32-bit biases of an int8 model: the runtime is to widen all of its weights as it loads them.
    "session.disable_quant_qdq": "1",
}


@dataclass(frozen=True)
class Device:
    """Where a model runs.

    Attributes:
        kind: "cpu", "openvino", "cuda" or "tensorrt".
        index: Which GPU, as CUDA counts them; 0 for the other kinds.
    """

    kind: str
    index: int = 0

    @property
    def gpu(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.kind in ("cuda", "tensorrt")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.gpu else self.kind


CPU = Device("cpu")


def parse(text: str) -> Device:
    """Return the device that a text names.

    Raises:
        EngineError: it names none.

    >>> parse("cuda:1")
    Device(kind='cuda', index=1)
    """
    found = re.fullmatch(r"(cpu|openvino)|(cuda|tensorrt)(?::([0-9]{1,3}))?", text)
    if not found:
        raise EngineError(f"device must be one of {FORMS}. Received: {text!r}")
    plain, gpu, index = found.groups()
    return Device(plain or gpu, int(index or 0))


def candidates(text: str, arithmetic: Literal["exact", "fast"] = "exact", precision: str = "fp32") -> list[Device]:
    """Return what to try, in this order: for "auto" a GPU and then the processor, else the device that is named.

    Args:
        text: "auto", or as `parse` takes it.
        arithmetic: What is asked for.
        precision: The bundle's.

    Raises:
        EngineError: as `parse`.
    """
    if text != "auto":
        return [parse(text)]
    # ONNX Runtime's kernels are ready sooner, and as fast as OpenVINO's or faster in float32 and in int8, in which that
    # holds even where OpenVINO has bfloat16 for the rest.
    faster = arithmetic == "fast" and precision != "int8" and openvino.has_bfloat16()
    return [Device("cuda"), *([Device("openvino")] if faster else []), CPU]


def fastest(device: Device) -> str:
    """Return the fastest arithmetic of a device: EXACT, or the numbers that it multiplies faster than float32."""
    if device.kind == "openvino":
        return openvino.BFLOAT16 if openvino.has_bfloat16() else EXACT
    return FLOAT16 if device.gpu else EXACT


def graph(model: bytes, device: Device, arithmetic: str = EXACT) -> bytes:
    """Return a model file's bytes as a device takes them in an arithmetic: EXACT, or the device's `fastest`."""
    if not device.gpu:
        return model
    alike = symmetric(model)
    # TensorRT chooses by itself what it computes in float16, if it may.
    return halved(alike) if (device.kind, arithmetic) == ("cuda", FLOAT16) else alike


def runtime() -> Any:
    """Import ONNX Runtime, its telemetry off.

    Raises:
        EngineError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise EngineError(
            "ONNX Runtime is not installed: pip install '.[cpu]' (or gpu, openvino) in the checkout"
        ) from None


def cache_folder() -> Path:
    """Return where compiled models are kept unless the user names a folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balanced-vae" / "tensorrt"


def providers(
    device: Device,
    buckets: Sequence[int],
    noise_size: int,
    cache: Path,
    cuda_graphs: bool = False,
    arithmetic: str = EXACT,
) -> Providers:
    """Return the ONNX Runtime providers of a device, the preferred one first: (name, options).

    The CPU's is not among a GPU's: the runtime refuses it beside GPU_SETTINGS.

    Args:
        device: The device; not OpenVINO.
        buckets: The batch sizes that will run.
        noise_size: Values of noise a sample.
        cache: TensorRT's folder for this one model.
        cuda_graphs: Record each bucket's kernels and replay them as one; kind "cuda" only.
        arithmetic: EXACT, or the device's `fastest`.
    """
    if not device.gpu:
        return CPU_PROVIDERS
    cuda = ("CUDAExecutionProvider", _cuda(device, cuda_graphs, arithmetic))
    if device.kind == "cuda":
        return [cuda]
    options = _tensorrt(device, min(buckets), max(buckets), noise_size, cache, arithmetic)
    return [("TensorrtExecutionProvider", options), cuda]


def open_session(model: bytes, device: Device, table: Providers = CPU_PROVIDERS, threads: int = 0) -> Any:
    """Return an InferenceSession on a device, or None where the device or its provider is not there.

    Args:
        model: A model file's bytes, from `graph`.
        device: The device.
        table: Its providers, from `providers`; the CPU has one.
        threads: CPU threads; 0 for all cores.

    Raises:
        EngineError: the device is there and refuses the graph.
    """
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is an error is raised too
    if device.gpu:
        # Without a driver the runtime would take the CPU instead, with pages of warnings.
        if table[0][0] not in onnxruntime.get_available_providers() or not NVIDIA_DRIVER.exists():
            return None
        options.use_deterministic_compute = True
        for key, value in GPU_SETTINGS.items():
            options.add_session_config_entry(key, value)
        if not _load_libraries(onnxruntime, device):
            return None
        if device.kind == "tensorrt":
            _make(Path(table[0][1]["trt_engine_cache_path"]))
    try:
        # The runtime's own fallback would print, and quietly take the CPU.
        session = onnxruntime.InferenceSession(model, options, providers=table, enable_fallback=0)
    except Exception as error:  # the runtime's own exceptions share no base
        raise refused(error, device, f"the {device} device cannot run this model") from None
    if device.gpu and table[0][0] not in session.get_providers():
        return None
    return session


def refused(error: Exception, device: Device, what: str) -> EngineError:
    """Return the one line for users of what the runtime raised; `what` is how it begins."""
    text = " ".join(str(error).split())
    if re.search(r"out of memory|(failed|unable) to allocate|bad[_ ]alloc|ALLOC_FAILED", text, re.IGNORECASE):
        # A GPU runs batches of one size, whatever the largest that is asked for.
        remedy = "free memory on it, or pass --device cpu" if device.gpu else "choose a smaller batch, or free memory"
        return EngineError(f"the {device} device is out of memory; {remedy}")
    if "fallback to CPU EP has been explicitly disabled" in text:
        return EngineError(
            f"the {device} device cannot run this model by itself: a part of it would run on the CPU; export it again, "
            "or pass --device cpu"
        )
    # NVIDIA's own words where there are some, else what stands behind the runtime's codes, files and functions.
    found = re.search(r"CU\w+ failure \d+: .*?(?= ;)", text)
    reason = found[0] if found else re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", text)[-1]
    return EngineError(f"{what}: {reason[:MOST_REASON]}" + ("" if device.kind == "cpu" else "; or pass --device cpu"))


def page_locked(device: Device) -> Any:
    """Return an OrtMemoryInfo of host memory that a GPU writes to directly, or None where none is offered.

    A runtime offers it if it was built with CUDA as a plug-in.
    """
    onnxruntime = runtime()
    for each in onnxruntime.get_ep_devices():
        if each.ep_name == "CUDAExecutionProvider":
            memory = each.memory_info(onnxruntime.OrtDeviceMemoryType.HOST_ACCESSIBLE)
            if memory is not None and memory.device_id == device.index:
                return memory
    return None


def _cuda(device: Device, cuda_graphs: bool, arithmetic: str) -> dict[str, str]:
    options = {
        "device_id": str(device.index),
        # TF32 takes samples more than a grey level away from other engines'.
        "use_tf32": "0" if arithmetic == EXACT else "1",
        # EXHAUSTIVE times kernels, and a restart could choose others. cuDNN's rules choose one for float32 transposed
        # convolutions that rounds a sample by its row, seen on an H200; those for float16 did so in batches of 128
        # only, and an engine that finds it does not start.
        "cudnn_conv_algo_search": "DEFAULT" if arithmetic == EXACT else "HEURISTIC",
        # Shapes are few and fixed: the arena need not grow by powers of two.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if arithmetic != EXACT:
        options["prefer_nhwc"] = "1"  # tensor cores take channels last
    return options | ({"enable_cuda_graph": "1"} if cuda_graphs else {})


def _tensorrt(
    device: Device, smallest: int, largest: int, noise_size: int, cache: Path, arithmetic: str
) -> dict[str, str]:
    return {
        "device_id": str(device.index),
        "trt_fp16_enable": str(arithmetic != EXACT),
        # One engine for all buckets, whose kernels hence differ less than those of one engine each.
        "trt_profile_min_shapes": f"noise:{smallest}x{noise_size}",
        "trt_profile_opt_shapes": f"noise:{largest}x{noise_size}",
        "trt_profile_max_shapes": f"noise:{largest}x{noise_size}",
        # TensorRT times kernels and takes the fastest. Its choice is kept, so that a restart samples the same bytes.
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }


def _load_libraries(runtime: Any, device: Device) -> bool:
    """Load the libraries that pip brings, which no loader finds by itself; tell whether they are there."""
    if device.kind == "tensorrt":
        # TensorRT takes TF32 unless this says otherwise: the provider has no option for it.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    runtime.set_default_logger_severity(3)  # it warns of every way to find CUDA but the one that it takes
    runtime.preload_dlls()  # CUDA and cuDNN
    if device.kind == "tensorrt":
        try:
            import_module("tensorrt")
        except ImportError:
            return False
    return True


def _make(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"cannot keep TensorRT's engines in {cache}: {error.strerror}; name another --cache"
        ) from None
