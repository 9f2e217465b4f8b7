"""Convolutions in float16, as a GPU's tensor cores take them.

The file stays as it is; the graph is changed as it is loaded for fast arithmetic. Almost all work is in convolutions,
so they and what stands between them compute in float16. What comes before, where a rounding could choose another
component of a mixture, and what comes after, where it could be a grey level, stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from serve.graph import FLOAT, FLOAT16
from serve.stubs.onnx.v1 import model_pb2 as onnx

CONVOLUTIONS = {"Conv", "ConvTranspose"}
BETWEEN = {"BatchNormalization", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Add", "Mul", "Identity"}
MOVES = {"Slice", "DepthToSpace", "SpaceToDepth"}  # their other inputs are whole numbers
INT = 2  # ONNX's kind of attribute


def halved(data: bytes) -> bytes:
    """Return a checked model file whose convolutions take, keep and give float16.

    Its noise and images have the types that they had.
    """
    model = onnx.Model.FromString(data)
    graph = model.graph
    nodes = list(_Halving(graph).nodes())
    read = {name for node in nodes for name in node.input}
    weights = [each for each in graph.initializer if each.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]  # the last are the types that were
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    return model.SerializeToString()


class _Halving:
    """One pass over a graph's nodes, which stand in the order in which they run."""

    def __init__(self, graph: onnx.Graph) -> None:
        self._graph = graph
        self._weights = {each.name: each for each in graph.initializer}
        self._half = {each.name for each in graph.initializer if each.data_type == FLOAT16}  # values in float16
        self._cast: dict[str, str] = {}  # values of the other type, and where the same are in this one

    def nodes(self) -> Iterator[onnx.Node]:
        """Yield the graph's nodes as they are to be, and what changes types between them."""
        for node in list(self._graph.node):
            half = node.op_type in CONVOLUTIONS or (node.op_type in BETWEEN | MOVES and node.input[0] in self._half)
            for at, name in enumerate(node.input):
                if name and node.op_type != "Cast" and (at == 0 or not (half and node.op_type in MOVES)):
                    yield from self._give(node, at, FLOAT16 if half else FLOAT)
            yield node
            if half:
                self._half.update(node.output)
            elif node.op_type == "Cast":  # the file's own: to store weights, or around what it computes in float16
                if next(each.i for each in node.attribute if each.name == "to") == FLOAT16:
                    self._half.add(node.output[0])
                elif node.input[0] in self._half:  # no need to widen it first
                    self._cast[node.output[0]] = node.input[0]

    def _give(self, node: onnx.Node, at: int, kind: int) -> Iterator[onnx.Node]:
        """Have a node take one of its inputs in a float type; yield the cast where one is needed."""
        name = node.input[at]
        if (name in self._half) == (kind == FLOAT16):
            return
        if name not in self._cast:
            self._cast[name] = f"{name}/{'half' if kind == FLOAT16 else 'whole'}"
            weights = self._weights.get(name)
            if weights is not None:
                values = np.frombuffer(weights.raw_data, np.float32).astype(np.float16)
                self._graph.initializer.add(
                    name=self._cast[name], data_type=FLOAT16, dims=weights.dims, raw_data=values.tobytes()
                )
            else:
                to = onnx.Attribute(name="to", type=INT, i=kind)
                yield onnx.Node(
                    op_type="Cast", name=self._cast[name], input=[name], output=[self._cast[name]], attribute=[to]
                )
        node.input[at] = self._cast[name]
