"""Sample from a bundle (one ONNX file: noise in, pixels out) in process, over gRPC, or from a shell.

`noise` is the contract that makes sample i of seed s the same picture everywhere; `bundle` what a file must
be; `engine` a bundle on a device; `service` and `client` the two ends of the wire; `job` a folder of samples.

>>> from serve import Engine, load
>>> engine = Engine(load())                      # the embedded faces
>>> engine.sample(seed=7, start=100, count=5)    # uint8 [5, 64, 64, 3]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.errors import BundleError, EngineError, ServeError

if TYPE_CHECKING:
    from serve.bundle import Bundle, Card, load
    from serve.client import Client
    from serve.engine import Engine

__all__ = ["Bundle", "BundleError", "Card", "Client", "Engine", "EngineError", "ServeError", "load"]

_HOMES = {"Bundle": "bundle", "Card": "bundle", "load": "bundle", "Client": "client", "Engine": "engine"}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` of the commands must not wait for gRPC or ONNX Runtime."""
    if name not in _HOMES:
        raise AttributeError(f"module 'serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"serve.{_HOMES[name]}"), name)
