"""Names that say where a node comes from: stage1/up8, stage1/scale8_0_0_conv, stage2/dense_0/relu."""

from __future__ import annotations

import onnx_ir as ir

ROLES = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("", "weight", "bias"),
    "BatchNormalization": ("", "scale", "shift", "mean", "variance"),
    "Reshape": ("", "shape"),
    "QuantizeLinear": ("", "step", "zero"),
}
LAYERS = ("Conv", "ConvTranspose", "Gemm")  # these take the layer's own name; its other nodes append theirs


def name_nodes(graph: ir.Graph) -> int:
    """Give every node a name of its own, and values and initialisers the names of what makes and reads them."""
    taken: set[str] = set()
    nodes = sorted(graph, key=lambda node: node.op_type not in LAYERS)  # stable: layers first, else in order
    for node in nodes:
        layer = str(node.name)
        node.name = _free(layer, taken) if layer not in taken else _free(f"{layer}/{node.op_type.lower()}", taken)
        taken.add(node.name)
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    fixed: dict[ir.Value, str] = {}
    for node in graph:
        for value in node.outputs:
            if value.name not in kept:
                value.name = f"{node.name}:0"
        roles = ROLES.get(node.op_type, ())
        for index, source in enumerate(node.inputs):
            if source is not None and source.is_initializer() and source not in fixed:
                fixed[source] = f"{node.name}/{roles[index] if index < len(roles) else f'constant{index}'}"
    for index, source in enumerate(fixed):
        source.name = f"#{index}"  # out of the way: a name may still be another's
    for source, name in fixed.items():
        source.name = name
    return len(nodes)


def _free(name: str, taken: set[str]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
