"""From [0, 1] to grey levels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.graph import constants, producer, replace, weight


def round_and_saturate(graph: ir.Graph) -> int:
    """Join * 255, Round and Cast to uint8 into one QuantizeLinear.

    It rounds as Round does, half to even, and saturates: 255.5 is 255 and not, as a cast may have it, 0.
    """
    made = 0
    for node in list(graph):
        if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.UINT8:
            continue
        rounded = producer(node.inputs[0], "Round")
        scaled = producer(rounded.inputs[0], "Mul") if rounded is not None else None
        factor = constants(scaled, 1) if scaled is not None else None
        if scaled is None or factor is None or factor[0].size != 1:
            continue
        step = weight(graph, np.array(1 / factor[0].item(), np.float32), f"{node.name}/step")
        zero = weight(graph, np.array(0, np.uint8), f"{node.name}/zero")
        replace(node, "QuantizeLinear", [scaled.inputs[0], step, zero], {})
        made += 1
    return made
