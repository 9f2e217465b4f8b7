"""The passes that make a converted graph small and fast. Each changes a graph and returns how often it applied.

They know the graphs that this package converts: one straight line of ONNX's own operators, weights as
initialisers, no nested graphs. A pass changes nothing that it cannot prove equal, up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from export.passes.affine import fold_affine_after, fold_affine_before, merge_affine
from export.passes.constants import fold_constants
from export.passes.dense import fold_reshape, make_gemm
from export.passes.layout import sink_transposes
from export.passes.linear import collapse_linear
from export.passes.names import name_nodes
from export.passes.pixels import round_and_saturate

Pass = Callable[[ir.Graph], int]

# The order matters. Constants come first, so that every weight is a plain initialiser. Layout comes next, so that
# channel-wise operators stand right beside the layer that they fold into.
PASSES: tuple[Pass, ...] = (
    fold_constants,
    make_gemm,
    sink_transposes,
    round_and_saturate,
    fold_reshape,
    fold_affine_after,
    fold_affine_before,
    merge_affine,
    collapse_linear,
    name_nodes,
)


def optimise(model: ir.Model, passes: Sequence[Pass] = PASSES) -> dict[str, int]:
    """Run passes on a model, in place, and return how often each applied. Unused nodes are removed after each pass."""
    done = {}
    for each in passes:
        done[each.__name__] = each(model.graph)
        RemoveUnusedNodesPass()(model)
        ShapeInferencePass()(model)
    return done
