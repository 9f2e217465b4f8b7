"""How gamma, the scale of the reconstruction error, is set: the balance policies.

The reconstruction term of a VAE is the negative log-likelihood of a Gaussian of scale gamma, so a
small gamma weighs reconstruction up and a large one weighs the KL divergence up. Setting its derivative
to zero gives gamma^2 = mse: gamma can be *computed* from the error as training goes (section 4 of the
paper). A policy's state is Keras weights, so it is saved and resumed with the model.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class ComputedBalance(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """The paper's policy: gamma^2 is the lowest running mean of the squared error so far.

    m <- min(m, momentum * m + (1 - momentum) * mse) at every minibatch, from m = 1; gamma = sqrt(m).
    No gradient flows through m, and m never rises.

    Args:
        momentum: Weight of the past in the running mean.
    """

    def __init__(self, momentum: float = 0.99, **options: Any) -> None:
        super().__init__(dtype="float32", **options)
        self.momentum = momentum

    def build(self, shape: Any) -> None:
        """Create m."""
        self.m = self.add_weight(name="m", shape=(), initializer="ones", trainable=False)

    def call(self, mse: Any, training: bool = False) -> Any:
        """Return gamma for a minibatch's mean squared error, a float32 scalar."""
        if training:
            running = self.momentum * self.m + (1 - self.momentum) * ops.stop_gradient(mse)
            self.m.assign(ops.minimum(self.m, running))
        return ops.sqrt(self.m)
