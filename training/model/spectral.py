"""Spectral normalisation (Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018)."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from training.types import Float32Array


class SpectrallyNormalised(layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """A layer whose kernel is divided by its largest singular value, as it trains and afterwards.

    The value is estimated by a step of power iteration at each call, and those of training add up. Keras' own wrapper
    puts the quotient in the kernel's place instead, and only as it trains: on JAX, whose weights change by the
    optimizer alone, the kernel outside of training would be another than in it.

    Args:
        layer: A layer with a kernel. The norm is that of the matrix whose columns are the kernel's last axis: outputs,
            or a transposed convolution's inputs.
    """

    def __init__(self, layer: layers.Layer) -> None:
        # float32, so that the norm is; and inputs are left for the layer to cast.
        super().__init__(name=layer.name, dtype="float32", autocast=False)
        self.layer = layer

    def build(self, shape: Any) -> None:
        """Build the layer, and the vector that power iteration goes on from."""
        self.layer.build(shape)
        width = self.layer.kernel.shape[-1]
        self.vector_u = self.add_weight(name="vector_u", shape=(1, width), initializer="normal", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        """Return what the layer gives with the divided kernel."""
        kernel, vector = self.divided()
        if training:
            self.vector_u.assign(vector)
        # All weights are named: within a scope another is not seen, such as that of a step that is compiled.
        mapping = [
            (each, kernel if each is self.layer.kernel else ops.convert_to_tensor(each)) for each in self.layer.weights
        ]
        with keras.StatelessScope(state_mapping=mapping):
            return self.layer(x)

    def divided(self) -> tuple[Any, Any]:
        """Return the divided kernel, and the vector after a step of power iteration."""
        kernel = ops.convert_to_tensor(self.layer.kernel)
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        fixed = ops.stop_gradient(matrix)
        v = _unit(ops.matmul(self.vector_u, ops.transpose(fixed)))
        u = _unit(ops.matmul(v, fixed))
        norm = ops.matmul(ops.matmul(v, matrix), ops.transpose(u))
        return kernel / ops.maximum(ops.squeeze(norm), 1e-12), u

    def plain_weights(self) -> list[Float32Array]:
        """Return the weights of a layer that does the same without being divided."""
        kernel = ops.convert_to_numpy(self.divided()[0])
        return [kernel if each is self.layer.kernel else ops.convert_to_numpy(each) for each in self.layer.weights]

    def compute_output_spec(self, x: Any, training: bool = False) -> Any:
        """Return the layer's."""
        return self.layer.compute_output_spec(x)


def _unit(vector: Any) -> Any:
    """Return a row [1, n] with length 1."""
    return vector / ops.maximum(ops.norm(vector), 1e-12)
