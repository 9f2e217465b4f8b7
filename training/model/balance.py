"""How reconstruction and KL divergence are balanced: the balance policies.

The reconstruction term of a VAE is the negative log-likelihood of a Gaussian of scale gamma, so a
small gamma weighs reconstruction up and a large one weighs the KL divergence up. Setting its derivative
to zero gives gamma^2 = mse: gamma can be *computed* from the error as training goes (section 3 of the
paper). A policy's state consists of Keras weights, so it is saved and resumed with the model.

A new policy is a subclass of Balance, a line in `policy`, and its name in `recipe.BALANCES`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from training.recipe import Recipe


class Balance(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """Gives gamma and the KL divergence's share for a minibatch's mean squared error.

    A subclass defines gamma, and may override the share, which is 1.
    """

    def __init__(self) -> None:
        super().__init__(dtype="float32")

    def call(self, mse: Any, training: bool = False) -> tuple[Any, Any]:
        """Return (gamma, share), float32 scalars; a policy's state changes in training only."""
        return self.gamma(mse, training), self.share(training)

    def gamma(self, mse: Any, training: bool) -> Any:
        """Return the scale of the reconstruction error."""
        raise NotImplementedError

    def share(self, training: bool) -> Any:
        """Return the factor of the KL divergence, 0 to 1."""
        return ops.ones(())


class Computed(Balance):
    """The paper's policy: gamma^2 is the lowest running mean of the squared error so far.

    m <- min(m, momentum * m + (1 - momentum) * mse) at every minibatch, from m = 1; gamma = sqrt(m).
    No gradient flows through m, and m never rises.

    Args:
        momentum: Weight of the past in the running mean.
        minimum: Whether m may only fall. Otherwise it is the running mean itself.
    """

    def __init__(self, momentum: float = 0.99, minimum: bool = True) -> None:
        super().__init__()
        self.momentum = momentum
        self.minimum = minimum

    def build(self, shape: Any) -> None:
        """Create m."""
        self.m = self.add_weight(name="m", shape=(), initializer="ones", trainable=False, aggregation="mean")

    def gamma(self, mse: Any, training: bool) -> Any:
        if training:
            running = self.momentum * self.m + (1 - self.momentum) * ops.stop_gradient(mse)
            self.m.assign(ops.minimum(self.m, running) if self.minimum else running)
        return ops.sqrt(self.m)


class Learned(Balance):
    """Dai & Wipf 2019: log gamma is a weight, trained with the networks; it starts at 0."""

    def build(self, shape: Any) -> None:
        """Create log gamma."""
        self.log_gamma = self.add_weight(name="log_gamma", shape=(), initializer="zeros")

    def gamma(self, mse: Any, training: bool) -> Any:
        return ops.exp(self.log_gamma)


class Fixed(Balance):
    """The traditional policy: gamma is a constant (a beta-VAE with beta = 2 gamma^2, up to scale).

    Args:
        value: gamma.
    """

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def gamma(self, mse: Any, training: bool) -> Any:
        return ops.full((), self.value)


class Annealed(Fixed):
    """Bowman et al. 2016: gamma is a constant, and the KL divergence's share rises from 0 to 1.

    Args:
        value: gamma.
        steps: Minibatches until the share is 1; it rises linearly.
    """

    def __init__(self, value: float = 1.0, steps: int = 1) -> None:
        super().__init__(value)
        self.steps = steps

    def build(self, shape: Any) -> None:
        """Create the count of minibatches."""
        self.seen = self.add_weight(name="seen", shape=(), initializer="zeros", trainable=False, aggregation="mean")

    def share(self, training: bool) -> Any:
        share = ops.minimum(self.seen / self.steps, 1.0)
        if training:
            self.seen.assign(self.seen + 1)
        return share


def policy(recipe: Recipe, stage: int, steps: int) -> Balance:
    """Return the recipe's policy of a stage; `steps` is the number of minibatches an epoch."""
    name, gamma = (recipe.balance, recipe.gamma) if stage == 1 else (recipe.balance2, recipe.gamma2)
    if name == "computed":
        return Computed(recipe.balance_momentum, recipe.balance_minimum)
    if name == "learned":
        return Learned()
    if name == "fixed":
        return Fixed(gamma)
    return Annealed(gamma, recipe.anneal_epochs * steps)
