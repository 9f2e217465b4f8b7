"""Inspects a bundle: its card, its graph, and what a sample costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.bundles.pack import unpack
from export.bundles.verify import describe
from export.passes import cost
from serve.bundle import Bundle


def inspect(bundle: Bundle) -> dict[str, Any]:
    """Return the facts of a bundle, JSON-ready.

    Costs are of one sample. flops: two for each multiplication of a layer, none for what moves or converts values
    (`cost.FREE`), one for each value that any other operator computes. activation_bytes: what all operators write. Both
    are None where a shape is not known before the graph runs. parameters: values of the weights of layers, whatever
    they are kept in; biases, scales, shapes and the like are not among them.

    Raises:
        ConversionError: ONNX's checker refuses its graph.
    """
    model = unpack(bundle)
    graph = model.graph
    inputs, outputs = ([_signature(value) for value in values] for values in (graph.inputs, graph.outputs))
    for value in graph.inputs:
        value.shape = ir.Shape([1, *list(value.shape or [])[1:]])
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for value in graph.outputs:
        value.shape = None
    ShapeInferencePass(strict_mode=False)(model)  # what cannot be inferred stays unknown
    constant = _constant(graph)
    varying = [node for node in graph if node not in constant]
    flops = [cost.flops(node) for node in varying]
    written = [_bytes(value) for node in varying for value in cost.outputs(node)]
    layers = [_weight(node, constant) for node in varying]
    weights = {kept: kept.const_value.size for kept in layers if kept is not None and kept.const_value is not None}
    return {
        "card": dataclasses.asdict(bundle.card),
        "digest": bundle.digest,
        "bytes": len(bundle.data),
        "inputs": inputs,
        "outputs": outputs,
        "opset": graph.opset_imports[""],
        "nodes": len(graph),
        "operators": dict(sorted(Counter(node.op_type for node in graph).items())),
        "parameters": sum(weights.values()),
        "kept_in": _kinds(weights),
        "flops": None if None in flops else sum(each or 0 for each in flops),
        "activation_bytes": None if None in written else sum(each or 0 for each in written),
    }


def render(facts: dict[str, Any]) -> str:
    """Return the facts as text for a terminal."""
    card = facts["card"]
    shape = "x".join(map(str, card["image_shape"]))
    dataset = ", ".join(f"{key} {value}" for key, value in card["dataset"].items() if value)
    kept = ", ".join(f"{count:,} in {kind}" for kind, count in facts["kept_in"].items())
    rows = {
        "name": card["name"],
        "makes": f"{shape} pictures from {card['noise_size']} numbers, by {card['latent_size']} latents",
        "prior": f"{card['prior']}, normalised: {card['normalisation']['mode']}",
        "precision": f"{card['precision']}, float weights stored as {card['store']}",
        "recipe": card["recipe"].get("name", ""),
        "dataset": dataset,
        "licence": card["licence"],
        "notes": card["notes"],
        "": None,
        "file": f"{facts['bytes'] / 1e6:.1f} MB, sha256 {facts['digest']}",
        **{f"{kind}put": _line(facts[f"{kind}puts"]) for kind in ("in", "out")},
        "parameters": f"{facts['parameters']:,} ({kept})",
        "a sample": f"{_text(facts['flops'], 1e9)} GFLOP, {_text(facts['activation_bytes'], 1e6)} MB of activations",
        "operators": f"{facts['nodes']}: " + ", ".join(f"{count} {name}" for name, count in facts["operators"].items()),
        "producers": ", ".join(f"{name} {version}" for name, version in card["producers"].items()),
    }
    lines = [f"{name:12}{value}" if value is not None else "" for name, value in rows.items() if value != ""]
    measured = [each for each in card["metrics"] if isinstance(each.get("value"), int | float)]
    lines += [f"{'metric':12}{each.get('metric')} {each.get('set', '')}: {each['value']:.2f}" for each in measured]
    if card["verification"]:
        lines += ["verified", describe(card["verification"], card["difference"])]
    return "\n".join(lines)


def _line(values: list[dict[str, Any]]) -> str:
    return "; ".join(f"{each['name']} {each['type']} [{', '.join(map(str, each['shape']))}]" for each in values)


def _text(value: int | None, unit: float) -> str:
    return "unknown" if value is None else f"{value / unit:.3g}"


def _signature(value: ir.Value) -> dict[str, Any]:
    sides = [side if isinstance(side, int) else str(side) for side in value.shape or []]
    return {"name": value.name, "type": _type(value), "shape": sides}


def _type(value: ir.Value) -> str:
    return value.dtype.numpy().name if value.dtype is not None else "unknown"


def _is_kept(value: ir.Value) -> bool:
    """Tell whether a value is an initialiser, without reading its array, which would copy it."""
    return value.const_value is not None and not value.is_graph_input()


def _constant(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute from weights alone."""
    found: set[ir.Node] = set()
    for node in graph:  # makers before readers
        given = [value for value in node.inputs if value is not None and not _is_kept(value)]
        if all(value.producer() in found for value in given):
            found.add(node)
    return found


def _weight(node: ir.Node, constant: set[ir.Node]) -> ir.Value | None:
    """Return the initialiser that a layer's weight is kept in, through whatever widens it."""
    value = node.inputs[1] if node.op_type in cost.WEIGHTED else None
    while value is not None and not _is_kept(value):
        maker = value.producer()
        value = maker.inputs[0] if maker in constant and maker.inputs else None
    return value


def _kinds(weights: dict[ir.Value, int]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for value, size in weights.items():
        kinds[_type(value)] += size
    return dict(sorted(kinds.items()))


def _bytes(value: ir.Value) -> int | None:
    size = cost.size(value)
    return None if size is None or value.dtype is None else int(size * value.dtype.itemsize)
