"""Two-stage VAEs whose reconstruction/KL balance is computed: trained, exported to one ONNX file, sampled fast.

>>> import balanced_vae
>>> engine = balanced_vae.Engine(balanced_vae.load())    # the embedded faces
>>> engine.sample(seed=7, start=100, count=5)            # uint8 [5, 64, 64, 3]
>>> engine.pictures(seed=7, start=100, count=1)[0].show()

`serve`, `training` and `export` have the rest. Those names are common: another module of such a name, in the current
folder or on PYTHONPATH, hides ours, and what is used from here then says so.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export import export
    from serve import AsyncClient, Client, Engine, Fleet, Options, ServeError, load
    from training import RECIPES, train

__all__ = [
    "RECIPES",
    "AsyncClient",
    "Client",
    "Engine",
    "Fleet",
    "Options",
    "ServeError",
    "__version__",
    "export",
    "load",
    "train",
]

_HOMES = {
    "AsyncClient": "serve",
    "Client": "serve",
    "Engine": "serve",
    "Fleet": "serve",
    "Options": "serve",
    "RECIPES": "training",
    "ServeError": "serve",
    "export": "export",
    "load": "serve",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Import on first use: what samples needs no TensorFlow."""
    if name == "__version__":
        return import_module("serve.version").VERSION
    if name not in _HOMES:
        raise AttributeError(f"module 'balanced_vae' has no attribute {name!r}")
    check_not_hidden(_HOMES[name])
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What is offered: a shell completes it before anything is imported."""
    return sorted({*globals(), *__all__})


def check_not_hidden(*packages: str) -> None:
    """Raise ImportError where Python finds something else than our package of one of these names."""
    home = Path(__file__).resolve().parents[1]
    for name in packages:
        found = find_spec(name)
        places = (
            [found.origin] if found and found.origin else list(found.submodule_search_locations or ()) if found else []
        )
        if not places:
            raise ImportError(f"the package {name} of balanced-vae is not installed in {home}; install it again")
        if Path(places[0]).resolve() != home / name / "__init__.py":
            raise ImportError(
                f"{places[0]} hides the package {name} of balanced-vae; rename it, or run this where it is neither in "
                "the current folder nor on PYTHONPATH"
            )
