"""The decoder's layers as plain convolutions, the only ones that runtimes have in int8."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from export.passes.graph import Array, add, constants, replace, weight

EVEN, ODD = "/even", "/odd"  # what the convolutions of a split layer are called


def split_rows(graph: ir.Graph, layers: Collection[str] | None = None) -> int:
    """Replace a transposed convolution of stride 2 by two convolutions, one of the even rows and one of the odd rows.

    Even and odd rows of the output are plain convolutions of the input, by every other row of the kernel; so are
    even and odd columns, which one convolution gives as twice the channels. With channels last in memory, columns
    are interleaved as they lie, and rows by copying them whole. Runtimes that have no int8 transposed
    convolution have these.

    Args:
        graph: The graph.
        layers: Names of those to take; all where it is None.
    """
    split = 0
    for node in list(graph):
        if node.op_type != "ConvTranspose" or (layers is not None and node.name not in layers):
            continue
        arrays = constants(node, 1, 2)
        sides = list(node.outputs[0].shape or [])[2:]
        attributes = _geometry(node)
        if arrays is None or not _doubling(attributes, arrays[0].shape[2:]):
            continue
        if not all(isinstance(side, int) for side in sides):
            continue
        height, width = (int(side) // 2 for side in sides if isinstance(side, int))
        kernel, bias = arrays
        name, channels, crop = str(node.name), bias.size, attributes["pads"][0]
        rows = []
        for parity, suffix in enumerate((EVEN, ODD)):
            part, pads = _row(kernel, crop, parity)
            inputs = [
                node.inputs[0],
                weight(graph, part, f"{name}{suffix}/weight"),
                weight(graph, np.tile(bias, 2), f"{name}{suffix}/bias"),
            ]
            row = add(node, "Conv", inputs, f"{name}{suffix}", pads=pads, kernel_shape=list(part.shape[2:]))
            last = add(node, "Transpose", [row], f"{name}{suffix}/last", perm=[0, 2, 3, 1])
            shape = weight(graph, np.array([-1, height, 1, width * 2 * channels], np.int64), f"{name}/row_shape")
            rows.append(add(node, "Reshape", [last, shape], f"{name}{suffix}/flat"))
        both = add(node, "Concat", rows, f"{name}/rows", axis=2)
        shape = weight(graph, np.array([-1, 2 * height, 2 * width, channels], np.int64), f"{name}/shape")
        picture = add(node, "Reshape", [both, shape], f"{name}/picture")
        replace(node, "Transpose", [picture], {"perm": [0, 3, 1, 2]}, name=f"{name}/first")
        split += 1
    return split


def norm_to_conv(graph: ir.Graph, layers: Collection[str] | None = None) -> int:
    """Replace a BatchNormalization by a 1x1 convolution with a group for each channel.

    It computes the same, and runtimes have it in int8, where they have no normalisation.
    """
    made = 0
    for node in list(graph):
        if node.op_type != "BatchNormalization" or (layers is not None and node.name not in layers):
            continue
        arrays = constants(node, 1, 2, 3, 4)
        if arrays is None:
            continue
        scale, shift, mean, variance = arrays
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        factor = (scale / np.sqrt(variance + epsilon)).astype(np.float32)
        inputs = [
            node.inputs[0],
            weight(graph, factor.reshape(-1, 1, 1, 1), f"{node.name}/weight"),
            weight(graph, shift - mean * factor, f"{node.name}/bias"),
        ]
        replace(node, "Conv", inputs, {"group": factor.size, "kernel_shape": [1, 1]})
        made += 1
    return made


def _doubling(attributes: dict[str, Any], size: tuple[int, ...]) -> bool:
    """Tell whether a transposed convolution doubles the sides of its input exactly, without dilation."""
    pads, extra = attributes.get("pads", [0] * 4), attributes.get("output_padding", [0, 0])
    plain = attributes.get("group", 1) == 1 and attributes.get("dilations", [1, 1]) == [1, 1]
    explicit = attributes.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in attributes
    square = size[0] == size[1] and pads[0] == pads[1] and pads[2] == pads[3] and extra[0] == extra[1]
    doubled = attributes.get("strides") == [2, 2] and size[0] - 2 - pads[0] - pads[2] + extra[0] == 0
    return plain and explicit and square and doubled


def _reach(size: int, crop: int, parity: int) -> list[int]:
    """Return the offsets of the inputs that an output reads.

    Output 2y + parity reads input y + d through the kernel's entry parity + crop - 2d, for every d that has one.
    """
    return sorted((parity + crop - entry) // 2 for entry in range(size) if (parity + crop - entry) % 2 == 0)


def _row(kernel: Array, crop: int, parity: int) -> tuple[Array, list[int]]:
    """Return the kernel [2 out, in, rows, columns] of the even or odd rows, even columns first, and its padding."""
    inputs, outputs, size = kernel.shape[:3]
    ys = _reach(size, crop, parity)
    xs = sorted({x for column in range(2) for x in _reach(size, crop, column)})
    top, bottom, left, right = min(ys[0], 0), max(ys[-1], 0), min(xs[0], 0), max(xs[-1], 0)  # padding is not negative
    part = np.zeros((2, outputs, inputs, bottom - top + 1, right - left + 1), np.float32)
    for column in range(2):
        for y in ys:
            for x in _reach(size, crop, column):
                entry = kernel[:, :, parity + crop - 2 * y, column + crop - 2 * x]
                part[column, :, :, y - top, x - left] = entry.T
    return part.reshape(2 * outputs, *part.shape[2:]), [-top, -left, bottom, right]


def _geometry(node: ir.Node) -> dict[str, Any]:
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
