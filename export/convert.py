"""The chain to one ONNX graph with the bundle's names, axes and card."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import onnx_ir as ir
import tensorflow as tf
import tf2onnx

from export.errors import ConversionError
from serve.bundle import Card

OPSET = 18
STORES = ("float32", "float16")
SMALLEST = 1024  # values; tensors below this save nothing worth a Cast node


def convert(chain: keras.Model, card: Card, store: str) -> bytes:
    """Return the bundle's bytes.

    Args:
        chain: noise [n, L] -> uint8 images.
        card: What the bundle says of itself.
        store: "float32", or "float16": weights take half the space and are widened as the graph is loaded;
            the arithmetic is float32 either way.

    Raises:
        ConversionError: the converted graph has other inputs or outputs than a bundle.
    """
    signature = [tf.TensorSpec([None, card.noise_size], tf.float32, name="noise")]
    proto, _ = tf2onnx.convert.from_function(tf.function(chain), input_signature=signature, opset=OPSET)
    model = ir.from_proto(proto)
    graph = model.graph
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        names = [value.name for value in (*graph.inputs, *graph.outputs)]
        raise ConversionError(f"expected one input and one output. Received: {', '.join(map(str, names))}")
    graph.inputs[0].name, graph.outputs[0].name = "noise", "images"
    graph.inputs[0].shape = ir.Shape(["batch", card.noise_size])
    graph.outputs[0].shape = ir.Shape(["batch", *card.image_shape])
    graph.name = card.name
    if store == "float16":
        store_float16(graph)
    model.metadata_props.clear()
    model.metadata_props.update(card.metadata())
    # ONNX's own operators are all that is used; tf2onnx declares more.
    for domain in [each for each in model.opset_imports if each]:
        del model.opset_imports[domain]
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def store_float16(graph: ir.Graph) -> None:
    """Keep large float32 weights as float16, each behind a Cast that the runtime folds as it loads."""
    for name, value in list(graph.initializers.items()):
        tensor: Any = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
            continue
        halves = tensor.numpy().astype(np.float16)
        if not np.isfinite(halves).all():
            raise ConversionError(f"{name} has values beyond float16's range; use --store float32")
        small = ir.Value(name=f"{name}_float16", const_value=ir.tensor(halves, name=f"{name}_float16"))
        small.shape, small.type = value.shape, ir.TensorType(ir.DataType.FLOAT16)
        cast = ir.node("Cast", [small], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_widen")
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        cast.outputs[0].name = name
        graph.register_initializer(small)
        graph.insert_before(graph[0], cast)
