"""Folds batch normalisation and latent normalisation, both x * scale + shift by channel, into the layers beside them.

A dense layer or a convolution can scale and shift its output at no cost, and a dense layer its input.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.graph import Array, bypass, constant, constants, only_reader, producer, replace, weight

CHANNELS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}  # the weight's axis of output channels


def channelwise(node: ir.Node) -> tuple[ir.Value, Array, Array] | None:
    """Return (x, scale, shift), both [channels] or [1], where a node is x * scale + shift by constants."""
    if node.op_type not in ("Add", "Sub", "Mul"):
        return None
    first, second = node.inputs
    array = constant(second)
    if array is None and node.op_type != "Sub":
        first, second, array = second, first, constant(first)
    if array is None or first is None or constant(first) is not None:
        return None
    rank = len(first.shape) if first.shape is not None else None
    if rank is None or array.ndim > rank:
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if full.size != full.shape[1]:  # channels are axis 1, of dense values and of pictures
        return None
    values = full.reshape(-1)
    one, nothing = np.ones_like(values), np.zeros_like(values)
    if node.op_type == "Mul":
        return first, values, nothing
    return first, one, -values if node.op_type == "Sub" else values


def fold_affine_after(graph: ir.Graph) -> int:
    """Fold x * scale + shift into the Conv, ConvTranspose or Gemm before it, where nothing else reads x."""
    folded = 0
    for node in list(graph):
        found = channelwise(node)
        above = producer(found[0], *CHANNELS) if found else None
        if found is None or above is None or not _plain(above):
            continue
        _, scale, shift = found
        kernel, bias = _parameters(above)
        along = [1] * kernel.ndim
        along[CHANNELS[above.op_type]] = -1
        _set_parameters(graph, above, kernel * scale.reshape(along), bias * scale + shift)
        bypass(node, above.outputs[0])
        folded += 1
    return folded


def fold_affine_before(graph: ir.Graph) -> int:
    """Fold x * scale + shift into the Gemm after it, where only that reads the result.

    A convolution cannot take it: its padding is zero after the shift, not before.
    """
    folded = 0
    for node in reversed(list(graph)):
        found, below = channelwise(node), only_reader(node.outputs[0])
        if found is None or below is None or below.op_type != "Gemm" or not _plain(below):
            continue
        value, scale, shift = found
        kernel, bias = _parameters(below)
        if below.inputs[0] is not node.outputs[0]:
            continue
        shifts = np.broadcast_to(shift, kernel.shape[:1]).astype(np.float64) @ kernel
        _set_parameters(graph, below, kernel * scale[:, None], (bias + shifts).astype(np.float32))
        bypass(node, value)
        folded += 1
    return folded


def merge_affine(graph: ir.Graph) -> int:
    """Join x * scale and + shift into one BatchNormalization, where x has other readers and so nothing folds.

    Runtimes fuse that operator with the ReLU that follows.
    """
    merged = 0
    for node in list(graph):
        found = channelwise(node)
        above = producer(found[0], "Mul") if found else None
        first = channelwise(above) if above is not None else None
        if found is None or above is None or first is None:
            continue
        value, scale, _ = first
        _, again, shift = found
        channels = max(scale.size, shift.size)
        if channels == 1 or value.shape is None or len(value.shape) != 4:
            continue
        zeros = np.zeros(channels, np.float32)
        arrays = {"scale": scale * again, "shift": shift, "mean": zeros, "variance": zeros + 1}
        wide = [np.broadcast_to(array, channels).astype(np.float32) for array in arrays.values()]
        weights = [weight(graph, array, f"{node.name}/{name}") for name, array in zip(arrays, wide, strict=True)]
        replace(node, "BatchNormalization", [value, *weights], {"epsilon": 0.0})
        merged += 1
    return merged


def _plain(node: ir.Node) -> bool:
    """Whether a layer's weights can be scaled: constants, one group, and a Gemm without attributes."""
    if constants(node, 1) is None or (len(node.inputs) > 2 and constants(node, 2) is None):
        return False
    if node.op_type == "Gemm":
        return not node.attributes
    group = node.attributes.get("group")
    return group is None or group.as_int() == 1


def _parameters(node: ir.Node) -> tuple[Array, Array]:
    kernel = constant(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert kernel is not None
    return kernel, np.zeros(kernel.shape[CHANNELS[node.op_type]], np.float32) if bias is None else bias


def _set_parameters(graph: ir.Graph, node: ir.Node, kernel: Array, bias: Array) -> None:
    node.resize_inputs(3)
    node.replace_input_with(1, weight(graph, kernel.astype(np.float32), f"{node.name}/weight"))
    node.replace_input_with(2, weight(graph, bias.astype(np.float32), f"{node.name}/bias"))
