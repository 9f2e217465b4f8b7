"""Extractors turn pictures into features. Any ONNX model can be one; every result names it."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from serve.devices import NVIDIA_DRIVER
from training.errors import DataError
from training.types import Float32Array, UInt8Array

_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


class Extractor(ABC):
    """A model that turns pictures into features.

    Args:
        path: The model's file; its stem is the extractor's name.
        side: Height and width of the pictures.

    Attributes:
        name: The name of the model.
        metric: The name of a Frechet distance of these features.
        resize: How pictures are resized to the model's input.
        digest: SHA-256 of the file, hexadecimal.
        size: Features a picture.
    """

    metric: str
    resize: str
    size: int

    def __init__(self, path: Path, side: int) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the extractor {path}: {error.strerror}{self.hint()}") from None
        self.name = path.stem
        self.digest = hashlib.sha256(data).hexdigest()
        self.open(data, path, side)

    @classmethod
    def hint(cls) -> str:
        """Return what to do if the file cannot be read."""
        return "; pass an ONNX model: uint8 [n, h, w, 3] -> float [n, features]"

    @abstractmethod
    def open(self, data: bytes, path: Path, side: int) -> None:
        """Load the model from the file's bytes, and set `metric`, `resize` and `size`."""

    @abstractmethod
    def run(self, images: UInt8Array) -> Any:
        """Return the model's output for uint8 [n, h, w, 3]."""

    def __call__(self, images: UInt8Array) -> Float32Array:
        """Return the features of uint8 [n, h, w, c], float32 [n, size]; grey pictures are repeated to 3 channels."""
        colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        return np.asarray(self.run(colour), np.float32)

    def card(self) -> dict[str, Any]:
        """Return what every record says of the extractor."""
        return {"name": self.name, "digest": self.digest, "features": self.size, "resize": self.resize}


class OnnxExtractor(Extractor):
    """An ONNX model, uint8 [n, h, w, 3] -> float [n, features], on ONNX Runtime, with CUDA if that is there.

    Raises:
        DataError: the file is not such a model.
    """

    def open(self, data: bytes, path: Path, side: int) -> None:
        self.metric = f"FD ({path.stem})"
        self.resize = "in the model"
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError:
            raise DataError("--features runs on ONNX Runtime: pip install '.[cpu]' (or gpu) in the checkout") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        providers: list[Any] = ["CPUExecutionProvider"]
        # Without a driver the runtime would fall back to the CPU, with pages of warnings.
        if NVIDIA_DRIVER.exists() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            onnxruntime.preload_dlls()
            # With TF32 the features would differ from those that a CPU computes.
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # the runtime's own exceptions share no base
            raise DataError(f"{path} is not an ONNX model that runs here: {str(error).splitlines()[0]}") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self._check(path, side, _takes(inputs, side) and len(outputs) == 1 and outputs[0].type in _FLOATS)
        try:
            features = self.run(np.zeros((2, side, side, 3), np.uint8))
        except Exception as error:  # the runtime's own exceptions share no base
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{path} does not run on pictures of {side}x{side}: {reason}") from None
        self._check(path, side, features.ndim == 2 and len(features) == 2 and features.shape[1] > 0)
        self.size = int(features.shape[1])

    def run(self, images: UInt8Array) -> Any:
        return self.session.run(None, {self.session.get_inputs()[0].name: images})[0]

    def _check(self, path: Path, side: int, fits: bool) -> None:
        if not fits:
            came = ", ".join(_described(value) for value in self.session.get_inputs())
            gave = ", ".join(_described(value) for value in self.session.get_outputs())
            raise DataError(
                f"{path} should map uint8 [n, {side}, {side}, 3] to float [n, features], with any n. "
                f"Received: {came} -> {gave}; take another extractor, or export it so"
            )


def _takes(inputs: list[Any], side: int) -> bool:
    """Tell whether the inputs are one batch of pictures, of any size or of this side."""
    if len(inputs) != 1 or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        return False
    batch, height, width, channels = inputs[0].shape
    return (
        not isinstance(batch, int)
        and channels == 3
        and all(each in (side, None) or isinstance(each, str) for each in (height, width))
    )


def _described(value: Any) -> str:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return f"{kind} [{', '.join(map(str, value.shape))}]"
