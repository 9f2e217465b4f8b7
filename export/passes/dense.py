"""Dense layers: one node each, with columns in the order that the convolutions read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.graph import constants, only_reader, producer, replace, weight

CHANNELS_FIRST = [0, 3, 1, 2]


def make_gemm(graph: ir.Graph) -> int:
    """Join a MatMul by a constant matrix with the Add of its bias into one Gemm."""
    made = 0
    for node in list(graph):
        product = producer(node.inputs[0], "MatMul") if node.op_type == "Add" else None
        arrays = constants(node, 1)
        kernel = constants(product, 1) if product is not None else None
        if product is None or arrays is None or kernel is None:
            continue
        if kernel[0].ndim == 2 and arrays[0].shape == kernel[0].shape[1:]:
            inputs = [*product.inputs, node.inputs[1]]
            replace(node, "Gemm", inputs, {})
            made += 1
    return made


def fold_reshape(graph: ir.Graph) -> int:
    """Fold Gemm, Reshape to [n, h, w, c], Transpose to [n, c, h, w] into a Gemm with its columns so ordered."""
    folded = 0
    for node in list(graph):
        if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != CHANNELS_FIRST:
            continue
        reshape = producer(node.inputs[0], "Reshape")
        gemm = producer(reshape.inputs[0], "Gemm") if reshape is not None else None
        shape = constants(reshape, 1) if reshape is not None else None
        arrays = constants(gemm, 1, 2) if gemm is not None else None
        if reshape is None or gemm is None or shape is None or arrays is None or shape[0].size != 4:
            continue
        rows, *sides = map(int, shape[0])
        kernel, bias = arrays
        order = np.arange(bias.size).reshape(sides).transpose(2, 0, 1).ravel()
        name = str(gemm.name)
        gemm.replace_input_with(1, weight(graph, kernel[:, order], f"{name}/weight"))
        gemm.replace_input_with(2, weight(graph, bias[order], f"{name}/bias"))
        grid = weight(graph, np.array([rows, sides[2], *sides[:2]], np.int64), f"{reshape.name}/shape")
        assert only_reader(reshape.outputs[0]) is node
        replace(node, "Reshape", [gemm.outputs[0], grid], {}, name=reshape.name)
        folded += 1
    return folded
