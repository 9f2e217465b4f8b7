"""Moves Transposes down the graph until they meet their inverse, or the uint8 output: a quarter of the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.passes.graph import Array, bypass, constant, replace, weight

UNARY = ("Relu", "Sigmoid", "Round", "Cast", "QuantizeLinear")
BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min")


def sink_transposes(graph: ir.Graph) -> int:
    """Move Transposes behind elementwise operators, and cancel those that meet their inverse."""
    moved = 0
    pending = [node for node in graph if node.op_type == "Transpose"]
    while pending:
        node = pending.pop()
        if node.graph is None:  # removed meanwhile
            continue
        if _merged(node):
            moved += 1
            pending += [each for each in graph if each.op_type == "Transpose"]
            continue
        for reader, _ in list(node.outputs[0].uses()):
            if reader.op_type == "Transpose":
                pending.append(reader)  # it may be the inverse
                continue
            below = _sunk(graph, node, reader)
            if below is not None:
                moved += 1
                pending.append(below)
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    return moved


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _merged(node: ir.Node) -> bool:
    """Join a Transpose with the one above it; drop it where that leaves the axes as they were."""
    source, permutation = node.inputs[0], _permutation(node)
    assert source is not None
    above = source.producer()
    if above is not None and above.op_type == "Transpose":
        upper = _permutation(above)
        permutation = [upper[axis] for axis in permutation]
        source = above.inputs[0]
        assert source is not None
    elif permutation != sorted(permutation):
        return False
    if permutation == sorted(permutation):
        bypass(node, source)
    else:
        replace(node, "Transpose", [source], {"perm": permutation})
    return True


def _sunk(graph: ir.Graph, node: ir.Node, reader: ir.Node) -> ir.Node | None:
    """Swap a Transpose with an elementwise reader; return the Transpose as it stands below, or None."""
    permutation, source = _permutation(node), node.inputs[0]
    inputs = list(reader.inputs)
    if reader.op_type in UNARY:
        if any((constant(each) is None or constant(each).size != 1) for each in inputs[1:]):  # type: ignore[union-attr]
            return None
        inputs[0] = source
    elif reader.op_type in BINARY:
        at = [each is node.outputs[0] for each in inputs].index(True)
        other = inputs[1 - at]
        array = constant(other)
        above = other.producer() if other is not None else None
        if array is not None:
            assert other is not None
            inputs[1 - at] = weight(graph, _before(array, permutation), str(other.name))
        elif above is not None and above.op_type == "Transpose" and _permutation(above) == permutation:
            inputs[1 - at] = above.inputs[0]
        else:
            return None
        inputs[at] = source
    else:
        return None
    output = reader.outputs[0]
    swapped = ir.node(reader.op_type, inputs, reader.attributes, name=reader.name)
    swapped.outputs[0].name, swapped.outputs[0].type = f"{output.name}/sunk", output.type
    graph.insert_before(reader, swapped)
    return replace(reader, "Transpose", [swapped.outputs[0]], {"perm": permutation}, name=node.name)


def _before(array: Array, permutation: Sequence[int]) -> Array:
    """Return a constant that met a transposed value, as it has to be for the value before the Transpose."""
    full = array.reshape((1,) * (len(permutation) - array.ndim) + array.shape)
    return np.transpose(full, np.argsort(permutation))
