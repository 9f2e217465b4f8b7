"""A graph on ONNX Runtime's CPU provider, whether it is a bundle yet or not."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from serve.devices import runtime
from serve.engine import Images
from serve.noise import Noise


def open_model(model: ir.Model | bytes, threads: int = 0) -> Any:
    """Return an InferenceSession of a graph, or of a model file's bytes; 0 threads takes all cores."""
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Graph:
    """Noise [n, noise_size] to images uint8 [n, h, w, c] by a graph, as it is: no padding, no buckets."""

    def __init__(self, model: ir.Model | bytes, threads: int = 0) -> None:
        self._session = open_model(model, threads)

    def __call__(self, noise: Noise) -> Images:
        """Return the images of some noise, as one batch."""
        images: Images = self._session.run(["images"], {"noise": noise})[0]
        return images
