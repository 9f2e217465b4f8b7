"""What a node costs: the one count that passes, precisions and reports go by."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Nothing is computed by these, or only once, as the graph is loaded.
FREE = (
    "Reshape",
    "Transpose",
    "Concat",
    "Cast",
    "DequantizeLinear",
    "QuantizeLinear",
    "DepthToSpace",
    "Slice",
    "Split",
)


def size(value: ir.Value | None, axis: int = 0) -> int | None:
    """Return how many values a value holds; None where a side is not known.

    Args:
        value: The value.
        axis: The first axis that counts; 1 leaves out the batch.
    """
    if value is None or value.shape is None:
        return None
    sides = list(value.shape)[axis:]
    known = [side for side in sides if isinstance(side, int)]
    return prod(known) if len(known) == len(sides) else None


def multiplications(node: ir.Node, axis: int = 0) -> int | None:
    """Return how often a layer multiplies; 0 for any other operator; None where a shape is not known.

    Args:
        node: The node.
        axis: As `size` takes it, of the layer's input and output.
    """
    if node.op_type not in WEIGHTED:
        return 0
    source, weight, target = node.inputs[0], node.inputs[1], node.outputs[0]
    if node.op_type == "ConvTranspose":
        places, each = size(source, axis), size(weight, 1)  # a value of the input meets every weight of its channel
    elif node.op_type == "Conv":
        places, each = size(target, axis), size(weight, 1)
    else:
        # Not the weight's side: Gemm may hold it transposed.
        places, each = size(target, axis), _inner(node, source)
    return None if places is None or each is None else places * each


def flops(node: ir.Node) -> int | None:
    """Return two for each multiplication of a layer, one for each value that another operator computes."""
    if node.op_type in FREE:
        return 0
    if node.op_type in WEIGHTED:
        products = multiplications(node)
        return None if products is None else 2 * products
    sizes = [size(value) for value in outputs(node)]
    return None if None in sizes else sum(each or 0 for each in sizes)


def outputs(node: ir.Node) -> list[ir.Value]:
    """Return a node's outputs, but for optional ones that are left out: those have no name."""
    return [value for value in node.outputs if value.name]


def _inner(node: ir.Node, source: ir.Value | None) -> int | None:
    """Return the side that a product of matrices sums over."""
    shape = source.shape if source is not None else None
    side = shape[-2 if node.attributes.get_int("transA", 0) else -1] if shape else None
    return side if isinstance(side, int) else None
