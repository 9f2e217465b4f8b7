"""fp16: feature maps in float16, for devices whose convolutions are faster in it.

The second stage and the latents are a small part of the work, and the sigmoid gives pixels: they stay in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.errors import ConversionError
from export.passes.graph import constant, weight

HALVED = ("Conv", "ConvTranspose", "BatchNormalization", "Relu", "Add", "Concat")


def halve(model: ir.Model) -> ir.Model:
    """Return a copy of a model whose operators on feature maps, [n, c, h, w], compute in float16.

    Raises:
        ConversionError: a weight is beyond float16's range.
    """
    copy = model.clone()
    graph = copy.graph
    halves: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        shape = node.outputs[0].shape
        if node.op_type not in HALVED or shape is None or len(shape) != 4:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, _half(graph, node, value, halves))
        output = node.outputs[0]
        output.type = ir.TensorType(ir.DataType.FLOAT16)
        wide = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/widen")
        wide.outputs[0].name, wide.outputs[0].shape = f"{output.name}/float32", shape
        wide.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        readers = list(output.uses())
        graph.insert_after(node, wide)
        for reader, index in readers:
            if reader is not wide:
                reader.replace_input_with(index, wide.outputs[0])
        halves[wide.outputs[0]] = output
    return copy


def _half(graph: ir.Graph, node: ir.Node, value: ir.Value, halves: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return a value in float16: as it was before it was widened, or narrowed."""
    if value not in halves:
        array = constant(value)
        if array is not None:
            narrow = array.astype(np.float16)
            if not np.isfinite(narrow).all():
                raise ConversionError(f"{value.name} has values beyond float16's range; use --precision fp32")
            halves[value] = weight(graph, narrow, f"{value.name}/float16")
        else:
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT16)}, name=f"{node.name}/narrow")
            cast.outputs[0].name, cast.outputs[0].shape = f"{value.name}/float16", value.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
            graph.insert_before(node, cast)
            halves[value] = cast.outputs[0]
    return halves[value]
