"""Sample from a bundle (one ONNX file: noise in, pixels out) in process, over gRPC, or from a shell.

`noise` is the contract that makes sample i of seed s the same picture everywhere; `bundle` what a file must
be, `card` what it says of itself; `engine` a bundle on a device; `server` and `client` the two ends of the wire;
`job` a folder of samples.

>>> from serve import Engine, load
>>> engine = Engine(load())                      # the embedded faces
>>> engine.sample(seed=7, start=100, count=5)    # uint8 [5, 64, 64, 3]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.errors import BundleError, EngineError, RemoteError, ServeError

if TYPE_CHECKING:
    from serve.bundle import Bundle, load
    from serve.card import Card
    from serve.client import AsyncClient, Client, Options
    from serve.engine import Engine

__all__ = [
    "AsyncClient",
    "Bundle",
    "BundleError",
    "Card",
    "Client",
    "Engine",
    "EngineError",
    "Options",
    "RemoteError",
    "ServeError",
    "load",
]

_HOMES = {
    "AsyncClient": "client",
    "Bundle": "bundle",
    "Card": "card",
    "Client": "client",
    "Engine": "engine",
    "Options": "client",
    "load": "bundle",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` of the commands must not wait for gRPC or ONNX Runtime."""
    if name not in _HOMES:
        raise AttributeError(f"module 'serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"serve.{_HOMES[name]}"), name)
