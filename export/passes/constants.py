"""Constant folding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.passes.graph import bypass, constant, weight


def fold_constants(graph: ir.Graph) -> int:
    """Replace every node all of whose inputs are constants by an initialiser, computed by ONNX's own reference."""
    folded = 0
    for node in list(graph):
        inputs = [each for each in node.inputs if each is not None]
        arrays: dict[str, Any] = {str(each.name): constant(each) for each in inputs}
        if len(node.outputs) != 1 or any(array is None for array in arrays.values()):
            continue
        proto = ir.to_proto(node)
        # The node itself decides the type and shape of its output.
        signature = onnx.helper.make_graph(
            [proto],
            "constant",
            [onnx.helper.make_tensor_value_info(str(each.name), int(each.dtype or 1), None) for each in inputs],
            [onnx.helper.make_tensor_value_info(proto.output[0], onnx.TensorProto.UNDEFINED, None)],
        )
        opsets = [onnx.helper.make_opsetid("", graph.opset_imports[""])]
        evaluator = ReferenceEvaluator(onnx.helper.make_model(signature, opset_imports=opsets))
        (array,) = evaluator.run(None, arrays)
        bypass(node, weight(graph, np.asarray(array), str(node.outputs[0].name)))
        folded += 1
    return folded
