"""A bundle's bytes compiled by OpenVINO for an AMD or Intel processor: in float32, or in bfloat16 where it has that.

The package itself, and not ONNX Runtime's provider of the same name, which offers no device on an AMD processor.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

from serve.model import EXACT, Decode, Images
from serve.noise import Noise

BFLOAT16 = "bfloat16"
DEVICE = "CPU"


def open_model(model: bytes, threads: int = 0, arithmetic: str = EXACT) -> Decode | None:
    """Return what runs a model file's bytes, from any threads; None where OpenVINO is not installed.

    Args:
        model: The bytes.
        threads: CPU threads; 0 for all cores.
        arithmetic: EXACT or BFLOAT16.

    Raises:
        RuntimeError: OpenVINO refuses the graph.
    """
    core = _core()
    if core is None:
        return None
    settings: dict[str, Any] = {
        # One request at a time takes all threads: one order of summation.
        "PERFORMANCE_HINT": "LATENCY",
        # Otherwise OpenVINO takes bfloat16 wherever the processor has it.
        "INFERENCE_PRECISION_HINT": "f32" if arithmetic == EXACT else "bf16",
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(core.read_model(model), DEVICE, settings).create_infer_request()
    one = Lock()

    def run(noise: Noise) -> Images:
        with one:
            images: Images = request.infer([noise])["images"]  # a copy
        return images

    return run


def installed() -> bool:
    """Tell whether OpenVINO is there."""
    return _core() is not None


def has_bfloat16() -> bool:
    """Tell whether OpenVINO is there and finds that this processor multiplies bfloat16."""
    core = _core()
    return core is not None and "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    try:
        return import_module("openvino").Core()
    except ImportError:
        return None
