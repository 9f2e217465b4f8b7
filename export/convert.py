"""The chain to one ONNX graph with a bundle's names and axes.

tf2onnx copies every constant in every pass, which took 70 s for 50 million weights. So it is shown weights as
*inputs*, whose values it never sees; they become the graph's initialisers here, after it is done.
"""

from __future__ import annotations

import keras
import numpy as np
import onnx_ir as ir
import tensorflow as tf
import tf2onnx

from export.errors import ConversionError

OPSET = 18
OUTPUTS = ("images", "latents")


def convert(chain: keras.Model) -> ir.Model:
    """Return the chain as ONNX, operator by operator, its weights bound.

    Args:
        chain: noise [n, L] -> images uint8, or -> (images, latents).

    Raises:
        ConversionError: the converted graph has other inputs or outputs than the chain.
    """
    size, split = chain.input_shape[-1], len(chain.trainable_variables)
    variables = [*chain.trainable_variables, *chain.non_trainable_variables]
    names = {f"weight_{index}": variable for index, variable in enumerate(variables)}

    def call(noise: tf.Tensor, *weights: tf.Tensor) -> list[tf.Tensor]:
        outputs, _ = chain.stateless_call(weights[:split], weights[split:], noise, training=False)
        return list(outputs) if isinstance(outputs, list | tuple) else [outputs]

    signature = [tf.TensorSpec([None, size], tf.float32, name="noise")]
    signature += [tf.TensorSpec(variable.shape, variable.dtype, name=name) for name, variable in names.items()]
    function = tf.function(call, input_signature=signature)
    proto, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    model: ir.Model = ir.from_proto(proto)
    _bind(model.graph, names)
    _name(model.graph, chain)
    return model


def _bind(graph: ir.Graph, names: dict[str, keras.Variable]) -> None:
    """Make initialisers of the inputs that stand for weights."""
    for value in list(graph.inputs):
        variable = names.get(str(value.name))
        if variable is None:
            continue
        graph.inputs.remove(value)
        array = np.asarray(keras.ops.convert_to_numpy(variable))
        value.const_value = ir.tensor(array, name=value.name)
        graph.register_initializer(value)


def _name(graph: ir.Graph, chain: keras.Model) -> None:
    """Give the inputs, outputs and axes a bundle's names, and nodes those of the layers that they come from."""
    outputs = chain.output if isinstance(chain.output, list | tuple) else [chain.output]
    if [value.name for value in graph.inputs] != ["noise"] or len(graph.outputs) != len(outputs):
        received = [str(value.name) for value in (*graph.inputs, *graph.outputs)]
        raise ConversionError(f"expected the input noise and {len(outputs)} outputs. Received: {', '.join(received)}")
    graph.inputs[0].shape = ir.Shape(["batch", chain.input_shape[-1]])
    for value, tensor, name in zip(graph.outputs, outputs, OUTPUTS, strict=False):
        value.name, value.shape = name, ir.Shape(["batch", *tensor.shape[1:]])
    layers = {layer.name for layer in chain._flatten_layers()}
    for node in graph:
        parts = [_layer(part, layers) for part in str(node.name).split("/")]
        node.name = "/".join(part for part in parts if part in layers) or parts[0]


def _layer(part: str, layers: set[str]) -> str:
    """Return a layer's name without the number that Keras adds where it is called again."""
    plain, _, number = part.rpartition("_")
    return plain if part not in layers and number.isdigit() else part
