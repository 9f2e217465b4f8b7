"""The VAE of either stage: an encoder, a decoder and a balance policy under one loss."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

LOG_2PI = math.log(2 * math.pi)


def xla() -> bool:
    """Tell whether to compile with XLA: on JAX always; on TensorFlow it makes a CPU four times slower."""
    return str(keras.backend.backend()) == "jax"


class VAE(keras.Model):  # type: ignore[misc]  # Keras ships no types
    """A variational autoencoder with a Gaussian likelihood of scale gamma.

    loss = kl_weight * KL + D * (mse / (2 gamma^2) + log gamma + log(2 pi) / 2) + the layers' own losses
    with D values a sample (section 3 of the paper).

    Args:
        encoder: x -> mean, log_sd of the posterior, each [n, latent].
        decoder: z [n, latent] -> a reconstruction shaped like x.
        balance: Policy that gives gamma for a minibatch's mse.
        kl_weight: k, the KL divergence's weight.
        peak: The value of x that stands for 1: 255 for uint8 images, 1 for latents.
        seed: Seeds the posterior's noise.
    """

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        balance: keras.layers.Layer,
        kl_weight: float = 1.0,
        peak: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.encoder = encoder
        self.decoder = decoder
        self.balance = balance
        self.kl_weight = kl_weight
        self.peak = peak
        self.noise = keras.random.SeedGenerator(seed)
        self.means = {name: keras.metrics.Mean(name) for name in ("mse", "kl", "gamma")}
        balance.build(())
        self.built = True

    def scale(self, x: Any) -> Any:
        """Return x as float32 in the decoder's range."""
        return ops.cast(x, "float32") / self.peak

    def call(self, x: Any, training: bool = False) -> tuple[Any, Any, Any]:
        """Return (reconstruction, mean, log_sd) with z drawn once from each posterior."""
        mean, log_sd = self.encoder(self.scale(x), training=training)
        z = mean + ops.exp(log_sd) * keras.random.normal(ops.shape(mean), seed=self.noise)
        return self.decoder(z, training=training), mean, log_sd

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of a minibatch, a scalar, and update the running means that `fit` reports."""
        reconstruction, mean, log_sd = y_pred
        mse = ops.mean(ops.square(self.scale(x) - reconstruction))
        gamma = self.balance(mse, training=training)
        values = math.prod(reconstruction.shape[1:])
        likelihood = values * (mse / (2 * ops.square(gamma)) + ops.log(gamma) + 0.5 * LOG_2PI)
        divergence = 0.5 * (ops.square(mean) + ops.exp(2 * log_sd) - 2 * log_sd - 1)
        kl = ops.mean(ops.sum(divergence, axis=-1))
        loss = self.kl_weight * kl + likelihood
        for penalty in self.losses:
            loss = loss + penalty
        for name, value in {"mse": mse, "kl": kl, "gamma": gamma}.items():
            self.means[name].update_state(value)
        return loss
