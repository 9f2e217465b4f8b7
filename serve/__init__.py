"""Sample from a bundle (one ONNX file: noise in, pixels out) in process, over gRPC, or from a shell.

`noise` is the contract that makes sample i of seed s the same picture everywhere; `bundle` what a file must
be, `card` what it says of itself; `model` the interface of whatever can be sampled; `engine` a bundle on a device;
`server` and `client` the two ends of the wire; `bulk` many samples, kept. Every error is a `ServeError`.

>>> from serve import Engine, load
>>> engine = Engine(load())                      # the embedded faces
>>> engine.sample(seed=7, start=100, count=5)    # uint8 [5, 64, 64, 3]
>>> engine.pictures(seed=7, start=100, count=5)  # the same as Pillow images
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.errors import (
    Broken,
    BundleError,
    Changed,
    Closed,
    Denied,
    EngineError,
    JobError,
    Overloaded,
    Rejected,
    RemoteError,
    ServeError,
    SettingsError,
    TimedOut,
    Unreachable,
)

if TYPE_CHECKING:
    from serve.bundle import Bundle, load
    from serve.card import Card
    from serve.client import AsyncClient, AsyncModel, Client, Fleet, FleetModel, Options, RemoteModel
    from serve.engine import Engine
    from serve.model import GenerativeModel

__all__ = [
    "AsyncClient",
    "AsyncModel",
    "Broken",
    "Bundle",
    "BundleError",
    "Card",
    "Changed",
    "Client",
    "Closed",
    "Denied",
    "Engine",
    "EngineError",
    "Fleet",
    "FleetModel",
    "GenerativeModel",
    "JobError",
    "Options",
    "Overloaded",
    "Rejected",
    "RemoteError",
    "RemoteModel",
    "ServeError",
    "SettingsError",
    "TimedOut",
    "Unreachable",
    "load",
]

_HOMES = {
    "AsyncClient": "client",
    "AsyncModel": "client",
    "Bundle": "bundle",
    "Card": "card",
    "Client": "client",
    "Engine": "engine",
    "Fleet": "client",
    "FleetModel": "client",
    "GenerativeModel": "model",
    "Options": "client",
    "RemoteModel": "client",
    "load": "bundle",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` of the commands must not wait for gRPC or ONNX Runtime."""
    if name not in _HOMES:
        raise AttributeError(f"module 'serve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"serve.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
