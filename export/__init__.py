"""Turn a run directory, or an fp32 bundle, into bundles: one ONNX file each, noise in, uint8 images out.

The rooms, each of which knows only those below it:

pipeline     `export`: from something exportable to verified bundles on disk, all of them or none
exportable   `from_run` (`chain` joins the trained networks, `convert` makes that ONNX) and `from_bundle`
bundles/     packed, verified, compared, inspected, laid out for Triton
precision/   fp16 and int8 from fp32, and the choice of int8 layers
passes/      what makes a graph small and fast, and what a node costs
session      a graph on ONNX Runtime

>>> from export import export, from_run
>>> export(from_run(Path("runs/mine"), name="mine"), {"fp32": Path("mine.onnx")})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.errors import ConversionError, ExportError, LimitError, VerificationError

if TYPE_CHECKING:
    from export.bundles.compare import Difference, compare_bundles
    from export.bundles.inspect import inspect
    from export.bundles.triton import write_repository
    from export.exportable import Exportable, from_bundle, from_run
    from export.pipeline import Limits, export

__all__ = [
    "ConversionError",
    "Difference",
    "ExportError",
    "Exportable",
    "LimitError",
    "Limits",
    "VerificationError",
    "compare_bundles",
    "export",
    "from_bundle",
    "from_run",
    "inspect",
    "write_repository",
]

_HOMES = {
    "Difference": "bundles.compare",
    "Exportable": "exportable",
    "Limits": "pipeline",
    "compare_bundles": "bundles.compare",
    "export": "pipeline",
    "from_bundle": "exportable",
    "from_run": "exportable",
    "inspect": "bundles.inspect",
    "write_repository": "bundles.triton",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` must not wait for TensorFlow or onnx."""
    if name not in _HOMES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"export.{_HOMES[name]}"), name)
