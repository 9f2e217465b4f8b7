"""Graphs on ONNX Runtime's CPU provider, whether they are bundles yet or not."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from serve.devices import CPU, open_session
from serve.model import Decode


def open_model(model: ir.Model | bytes, threads: int = 0) -> Any:
    """Return an InferenceSession of a graph, or of a model file's bytes; 0 threads takes all cores.

    Raises:
        EngineError: the runtime refuses the graph, or is not installed.
    """
    data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    return open_session(data, CPU, threads=threads)


def decoder(model: ir.Model | bytes, threads: int = 0) -> Decode:
    """Return what a graph makes of noise, as it is: each call is one run, without padding or buckets."""
    session = open_model(model, threads)
    return lambda noise: session.run(["images"], {"noise": noise})[0]
