"""Everything from the latent to the first ReLU is linear, and becomes one matrix where that multiplies less.

The decoder's stem, its first transposed convolution and whatever reads that before a ReLU (a shortcut, a batch
normalisation) map 64 numbers to some thousands. As layers they are a seventh of the work of 64x64 pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.passes.cost import WEIGHTED, multiplications, size
from export.passes.graph import Array, add, constant, replace, weight
from export.session import open_model

LINEAR = (*WEIGHTED, "BatchNormalization", "Add", "Sub", "Mul", "Reshape", "Transpose")


@dataclass(frozen=True)
class Region:
    """The nodes that are linear in one value.

    Attributes:
        root: The value, [batch, n].
        nodes: The nodes that compute linearly from it, in order.
        ends: Their values that the rest of the graph reads.
        saved: Multiplications saved per sample where every end becomes one matrix.
    """

    root: ir.Value
    nodes: list[ir.Node]
    ends: list[ir.Value]
    saved: int


def collapse_linear(graph: ir.Graph) -> int:
    """Replace what is linear in a small value by one Gemm for each of its ends, where that multiplies less."""
    values = [*graph.inputs, *(node.outputs[0] for node in graph)]
    regions = [_region(graph, value) for value in values if value.shape is not None and len(value.shape) == 2]
    best = max(regions, key=lambda region: region.saved, default=None)
    if best is None or best.saved <= 0:
        return 0
    for end, (matrix, bias) in zip(best.ends, _matrices(graph, best), strict=True):
        node = end.producer()
        assert node is not None
        name, count = str(node.name), bias.size
        inputs = [
            best.root,
            weight(graph, matrix.reshape(-1, count), f"{name}/weight"),
            weight(graph, bias.reshape(count), f"{name}/bias"),
        ]
        if bias.ndim == 1:
            replace(node, "Gemm", inputs, {})
            continue
        flat = add(node, "Gemm", inputs, name)
        shape = weight(graph, np.array([-1, *bias.shape], np.int64), f"{name}/shape")
        replace(node, "Reshape", [flat, shape], {}, name=f"{name}/grid")
    return len(best.nodes)


def _region(graph: ir.Graph, root: ir.Value) -> Region:
    inside, nodes = {root}, []
    for node in graph:
        varying = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type not in LINEAR or not varying or not inside.issuperset(varying):
            continue
        if len(varying) > 1 and node.op_type not in ("Add", "Sub"):
            continue
        inside.add(node.outputs[0])
        nodes.append(node)
    ends = [
        node.outputs[0]
        for node in nodes
        if node.outputs[0].is_graph_output() or any(use.node not in nodes for use in node.outputs[0].uses())
    ]
    sizes = [size(value, 1) for value in (root, *ends)]
    costs = [multiplications(node, 1) for node in nodes]
    if None in sizes or None in costs or not ends:
        return Region(root, nodes, ends, 0)
    width, *wanted = (size for size in sizes if size is not None)
    saved = sum(cost for cost in costs if cost is not None) - width * sum(wanted)
    return Region(root, nodes, ends, saved)


def _matrices(graph: ir.Graph, region: Region) -> list[tuple[Array, Array]]:
    """Return (matrix [n, ...], bias [...]) of every end, by running the region on unit vectors."""
    part = ir.convenience.extract(graph, [region.root], region.ends)
    session = open_model(ir.Model(part, ir_version=10))
    width = size(region.root, 1)
    assert width is not None
    unit = np.eye(width, dtype=np.float32)
    name = session.get_inputs()[0].name
    # Both signs, so that a large bias does not cost the matrix precision.
    above, below, none = (session.run(None, {name: x}) for x in (unit, -unit, np.zeros_like(unit[:1])))
    return [((up - down) / 2, zero[0]) for up, down, zero in zip(above, below, none, strict=True)]
