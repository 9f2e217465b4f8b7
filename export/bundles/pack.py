"""From a graph to a bundle's bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from export.errors import ConversionError
from export.passes.graph import constant, weight
from serve.bundle import Bundle, check, metadata
from serve.card import Card
from serve.text import one_line

STORES = ("float32", "float16")
SMALLEST = 1024  # values; tensors below this save nothing worth a Cast node


def pack(model: ir.Model, card: Card) -> Bundle:
    """Return a graph as a bundle with this card, its weights stored as the card says.

    float16 halves the file; weights are widened as the graph is loaded, and the arithmetic is what it was.

    Raises:
        ConversionError: a weight is beyond float16's range.
        BundleError: the graph is not a bundle's.
    """
    copy = model.clone()
    graph = copy.graph
    if card.store == "float16":
        _store_float16(graph)
    ir.passes.Sequential(RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass())(copy)
    graph.name = card.name
    copy.producer_name, copy.producer_version = "balanced-vae", card.producers.get("balanced-vae", "")
    copy.metadata_props.clear()
    copy.metadata_props.update(metadata(card))
    data: bytes = ir.to_proto(copy).SerializeToString(deterministic=True)
    return Bundle(data, check(data), hashlib.sha256(data).hexdigest())


def unpack(bundle: Bundle) -> ir.Model:
    """Return a bundle's graph, which ONNX's checker has passed.

    Raises:
        ConversionError: the checker refuses it, or it cannot be read.
    """
    try:
        model = onnx.load_model_from_string(bundle.data)
        onnx.checker.check_model(model, full_check=True)
        return ir.from_proto(model)
    except Exception as error:  # the exceptions of onnx and onnx-ir share no base
        raise ConversionError(f"the graph of {bundle.card.name} cannot be read: {one_line(str(error), 200)}") from None


def _store_float16(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or array.size < SMALLEST:
            continue
        halves = array.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ConversionError(f"{value.name} has values beyond float16's range; use --store float32")
        small = weight(graph, halves, f"{value.name}/float16")
        cast = ir.node("Cast", [small], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/widen")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = (
            f"{value.name}/wide",
            value.shape,
            value.type,
        )
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.insert_before(graph[0], cast)
