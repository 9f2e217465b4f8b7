"""What every pass needs: reading a constant, finding the readers of a value, replacing a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """Return a value's array where it is a constant."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def constants(node: ir.Node, *indices: int) -> list[Array] | None:
    """Return a node's constant inputs at some positions; None unless all are there and constant."""
    found = [constant(node.inputs[index]) if index < len(node.inputs) else None for index in indices]
    return None if any(each is None for each in found) else [each for each in found if each is not None]


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node of one of these operators that makes a value, where this is its only reader."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators and only_reader(node.outputs[0]) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value; None where there are more, or it is an output of the graph."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def noise_size(graph: ir.Graph) -> int:
    """Return how many values of noise a graph takes per sample."""
    shape = graph.inputs[0].shape
    assert shape is not None
    assert isinstance(shape[1], int)
    return shape[1]


def weight(graph: ir.Graph, array: Array, like: str) -> ir.Value:
    """Add an initialiser under a free name that starts with `like`."""
    name, count = like, 0
    while name in graph.initializers:
        count += 1
        name = f"{like}.{count}"
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array, order="C"), name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def add(before: ir.Node, operator: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
    """Put a node before another; return its output."""
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}:{operator}"
    _graph(before).insert_before(before, node)
    return node.outputs[0]


def replace(
    node: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    name: str | None = None,
) -> ir.Node:
    """Put a new node in the place of another, whose output's name, type and readers it takes over."""
    graph, old = _graph(node), node.outputs[0]
    new = ir.node(operator, inputs, attributes, name=name or node.name)
    graph.insert_before(node, new)
    output = new.outputs[0]
    output.shape, output.type = old.shape, old.type
    bypass(node, output)
    return new


def bypass(node: ir.Node, value: ir.Value) -> None:
    """Let the readers of a node's output read `value` instead, and remove the node. A graph output keeps its name."""
    old = node.outputs[0]
    name = old.name
    if old.is_graph_output():
        value.shape, value.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    _graph(node).remove(node, safe=True)
    if value.producer() is not None:
        value.name = name


def _graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    return graph
