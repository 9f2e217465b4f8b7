"""The engine: a bundle on a device. Noise in, uint8 out; it knows nothing of files or wires.

Batches run in a few fixed sizes, the buckets, and what is short is padded: providers tune themselves per
shape, and the noise contract needs a sample to be the same bytes whatever shares its batch. That is not
taken on trust: at warm-up every bucket has to give the same bytes as the largest, or it is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.bundle import Bundle, Card
from serve.errors import EngineError
from serve.noise import Noise, draw

Images = npt.NDArray[np.uint8]

DEVICES = ("auto", "cuda", "openvino", "cpu")
BATCH = {"cuda": 256, "openvino": 64, "cpu": 32}  # the largest bucket where none is asked for
SMALL = 8  # the smallest bucket; below it, padding costs less than another tuned shape
NEEDS = {
    "cuda": "NVIDIA's driver and pip install 'balanced-vae[gpu]'",
    "openvino": "an Intel processor and pip install 'balanced-vae[openvino]'",
}
NVIDIA_DRIVER = Path("/dev/nvidiactl")
PROBE = 16  # samples that buckets have to agree on


class Engine:
    """A bundle ready to run.

    Args:
        bundle: The model.
        device: One of DEVICES; auto takes the first that is there.
        threads: CPU threads; 0 for all cores.
        batch: The largest batch; 0 for the device's default. It changes speed, never samples.

    Raises:
        EngineError: no ONNX Runtime, no such device, or a graph the runtime refuses.

    >>> engine = Engine(load())
    >>> engine.sample(seed=7, start=100, count=5).shape
    (5, 64, 64, 3)
    """

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int = 0, batch: int = 0) -> None:
        self.card: Card = bundle.card
        self.digest = bundle.digest
        if device not in DEVICES:
            raise EngineError(f"device must be one of {', '.join(DEVICES)}. Received: {device!r}")
        onnxruntime = runtime()
        for self.device in DEVICES[1:] if device == "auto" else (device,):
            self._session = _open(onnxruntime, bundle.data, self.device, threads)
            if self._session is not None:
                break
        else:
            raise EngineError(f"there is no {device} device here: it needs {NEEDS[device]}; or pass --device cpu")
        batch = batch or BATCH[self.device]
        self.buckets = self._warm_up(sorted({min(SMALL, batch), batch}))

    @property
    def name(self) -> str:
        """The model's name."""
        return self.card.name

    @property
    def batch(self) -> int:
        """Samples in the largest bucket."""
        return self.buckets[-1]

    def compute(self, noise: Noise) -> Images:
        """Return the images of noise [n, noise_size], 1 <= n <= batch: uint8 [n, height, width, channels]."""
        return self.run(noise)

    def run(self, noise: Noise) -> Images:
        """Return the images of noise [n, noise_size], n of any size: uint8 [n, height, width, channels]."""
        images = np.empty((len(noise), *self.card.image_shape), np.uint8)
        for at in range(0, len(noise), self.batch):
            part = noise[at : at + self.batch]
            bucket = next(size for size in self.buckets if size >= len(part))
            images[at : at + len(part)] = self._run_bucket(part, bucket)[: len(part)]
        return images

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """Return samples start ... start + count - 1 of a seed: uint8 [count, height, width, channels].

        Raises:
            ValueError: seed, start or count out of the contract's range.
        """
        noise = draw(seed, start, count, self.card.noise_size)
        return self.run(noise * np.float32(temperature))

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """Yield (first index, images) for a range of any length, a batch at a time."""
        for at in range(start, start + count, self.batch):
            yield at, self.sample(seed, at, min(self.batch, start + count - at), temperature)

    def _run_bucket(self, noise: Noise, bucket: int) -> Images:
        if len(noise) < bucket:
            noise = np.concatenate([noise, np.zeros((bucket - len(noise), noise.shape[1]), np.float32)])
        images: Images = self._session.run(["images"], {"noise": noise})[0]
        return images

    def _warm_up(self, buckets: list[int]) -> list[int]:
        """Run every bucket; return those whose samples are the largest one's, byte for byte."""
        noise = draw(0, 0, PROBE, self.card.noise_size)
        self.buckets = buckets[-1:]
        wanted = self.run(noise)
        agreed = []
        for bucket in buckets:
            self.buckets = [bucket]
            # Not from the first on, so that samples also change their row within the batch.
            if np.array_equal(self.run(noise[3:]), wanted[3:]):
                agreed.append(bucket)
        if buckets[-1] not in agreed:
            raise EngineError(
                f"on the {self.device} device samples depend on what shares their batch, which breaks the noise "
                "contract; choose another --device"
            )
        return agreed


def runtime() -> Any:
    """Import ONNX Runtime, its telemetry off."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return import_module("onnxruntime")
    except ImportError:
        raise EngineError("ONNX Runtime is not installed: pip install 'balanced-vae[cpu]' (or gpu, openvino)") from None


def _open(runtime: Any, model: bytes, device: str, threads: int) -> Any:
    """Return a session on a device, or None where the device or its provider is not there.

    Raises:
        EngineError: the device is there and refuses the graph.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    providers: list[Any] | None = ["CPUExecutionProvider"]
    if device == "cuda":
        # Without a driver the runtime would take the CPU instead, with pages of warnings.
        if "CUDAExecutionProvider" not in runtime.get_available_providers() or not NVIDIA_DRIVER.exists():
            return None
        runtime.preload_dlls()  # CUDA and cuDNN as pip brings them
        # TF32 would take samples more than a grey level away from other engines'.
        settings = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
    elif device == "openvino":
        if not _add_openvino(runtime, options):
            return None
        providers = None  # the options name the device
    try:
        session = runtime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the runtime's own exceptions share no base
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"the {device} device cannot run this model: {reason}") from None
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        return None
    return session


def _add_openvino(runtime: Any, options: Any) -> bool:
    """Register OpenVINO's plug-in provider for its CPU device, where the package is installed."""
    try:
        plugin = import_module("onnxruntime_ep_openvino")
    except ImportError:
        return False
    name = plugin.get_ep_name()
    if not any(device.ep_name == name for device in runtime.get_ep_devices()):
        runtime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [each for each in runtime.get_ep_devices() if each.ep_name == name and "CPU" in str(each.device.type)]
    if devices:
        # The latency hint keeps one inference request, hence one order of summation.
        options.add_provider_for_devices(devices[:1], {"load_config": '{"CPU": {"PERFORMANCE_HINT": "LATENCY"}}'})
    return bool(devices)
