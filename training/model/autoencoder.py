"""An encoder and a decoder under one loss, variational or deterministic: what either stage trains."""

from __future__ import annotations

import math
from typing import Any, TypedDict, Unpack

import keras
from keras import ops

from training.model.balance import Balance
from training.model.replicas import all_reduce_mean, normal_like, replicas
from training.model.tangent import along

LOG_2PI = math.log(2 * math.pi)


def xla() -> bool:
    """Tell whether to compile with XLA: always on JAX, never on TensorFlow, where it makes a CPU four times slower."""
    return str(keras.backend.backend()) == "jax"


class NonFiniteTerms(keras.metrics.Metric):  # type: ignore[misc]  # Keras ships no types
    """Which terms of a loss were NaN or infinite, in the first minibatch where any was: bit i stands for term i.

    The graph itself keeps the flags, so that the term is known exactly and no minibatch has to wait for the device.
    """

    def __init__(self, terms: int) -> None:
        super().__init__(name="non_finite")
        self.flags = self.add_variable((terms,), "zeros", name="flags")  # a sum over devices: above 0 where any had one

    def update_state(self, terms: Any) -> None:
        """Check a minibatch's terms, scalars."""
        flags = ops.cast(ops.logical_not(ops.isfinite(ops.stack(terms))), "float32")
        self.flags.assign(ops.where(ops.any(self.flags > 0), self.flags.value, flags))

    def result(self) -> Any:
        """Return the bits as a number; 0 while all terms are finite."""
        return ops.sum(ops.where(self.flags > 0, 2.0 ** ops.arange(self.flags.shape[0], dtype="float32"), 0.0))


class Options(TypedDict, total=False):
    """The arguments that every autoencoder passes on to Autoencoder, which describes them."""

    input_scale: float
    seed: int
    dtype: str


class Autoencoder(keras.Model):  # type: ignore[misc]  # Keras ships no types
    """An encoder and a decoder, trained together.

    A subclass defines the loss and names its terms, whose running means `fit` reports.

    Args:
        encoder: x -> statistics of the latent, each [n, latent].
        decoder: z [n, latent] -> a reconstruction shaped like x.
        input_scale: The value of x that stands for 1: 255 for uint8 images, 1 for latents.
        seed: Seeds the latent noise.
        dtype: The networks' precision; the loss is scaled where it is mixed_float16.
    """

    TERMS: tuple[str, ...]

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        input_scale: float = 1.0,
        seed: int = 0,
        dtype: str = "float32",
    ) -> None:
        super().__init__(dtype=dtype)
        self.encoder = encoder
        self.decoder = decoder
        self.input_scale = input_scale
        self.noise = keras.random.SeedGenerator(seed)
        self.means = {name: keras.metrics.Mean(name) for name in self.TERMS}
        self.non_finite = NonFiniteTerms(len(self.TERMS))
        self.built = True

    def scale(self, x: Any) -> Any:
        """Return x as float32 in the decoder's range."""
        return ops.cast(x, "float32") / self.input_scale

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return a minibatch's loss, a scalar that includes the layers' own losses, and update the terms' means."""
        loss, terms = self.loss_and_terms(self.scale(x), y_pred, training)
        for penalty in self.losses:
            loss = loss + penalty
        for name, value in zip(self.TERMS, terms, strict=True):
            self.means[name].update_state(value)
        self.non_finite.update_state(terms)
        return loss / replicas()  # gradients are summed over replicas

    def loss_and_terms(self, x: Any, outputs: Any, training: bool) -> tuple[Any, list[Any]]:
        """Return the loss of a minibatch [n, ...] in the decoder's range, and the values of TERMS: all scalars."""
        raise NotImplementedError


class VAE(Autoencoder):
    """A variational autoencoder with a Gaussian likelihood of scale gamma.

    loss = k * share * KL + D * (mse / (2 gamma^2) + log gamma + log(2 pi) / 2) + the layers' own losses
    with D values a sample (section 3 of the paper). The balance policy gives gamma and the share.

    Args:
        encoder: x -> mean, log_sd of the posterior, each [n, latent].
        decoder: z [n, latent] -> a reconstruction shaped like x.
        balance: Gives gamma and the KL divergence's share for a minibatch's mse.
        kl_weight: k.
        options: input_scale, seed and dtype, as Autoencoder takes them.
    """

    TERMS = ("mse", "kl", "gamma")

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        balance: Balance,
        kl_weight: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.balance = balance
        self.kl_weight = kl_weight
        balance.build(())

    def call(self, x: Any, training: bool = False) -> tuple[Any, Any, Any]:
        """Return (reconstruction, mean, log_sd) with z drawn once from each posterior."""
        mean, log_sd = self.encoder(self.scale(x), training=training)
        z = mean + ops.exp(log_sd) * normal_like(mean, self.noise)
        return self.decoder(z, training=training), mean, log_sd

    def loss_and_terms(self, x: Any, outputs: Any, training: bool) -> tuple[Any, list[Any]]:
        reconstruction, mean, log_sd = outputs
        mse = ops.mean(ops.square(x - reconstruction))
        gamma, share = self.balance(all_reduce_mean(mse), training=training)
        values = math.prod(reconstruction.shape[1:])
        likelihood = values * (mse / (2 * ops.square(gamma)) + ops.log(gamma) + 0.5 * LOG_2PI)
        divergence = 0.5 * (ops.square(mean) + ops.exp(2 * log_sd) - 2 * log_sd - 1)
        kl = ops.mean(ops.sum(divergence, axis=-1))
        return self.kl_weight * share * kl + likelihood, [mse, kl, gamma]


class RAE(Autoencoder):
    """A deterministic autoencoder, regularised or plain (Ghosh et al., "From variational to deterministic").

    loss = mse + beta * |z|^2 / 2 + lambda * REG + the layers' own losses, with REG one of
    "l2": the sum of the squares of the decoder's kernels; "gp": |grad D(z)|^2; anything else: 0 (spectral
    normalisation, "sn", is part of the decoder).

    The gradient's square is taken along one random direction a sample, |J v|^2 with v ~ N(0, I): its mean over
    v is the squared Frobenius norm of the decoder's Jacobian J.

    Args:
        encoder: x -> z [n, latent].
        decoder: z [n, latent] -> a reconstruction shaped like x.
        embedding: beta.
        regulariser: REG.
        regularisation: lambda.
        options: input_scale, seed and dtype, as Autoencoder takes them.
    """

    TERMS = ("mse", "embedding", "penalty")

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        embedding: float,
        regulariser: str,
        regularisation: float,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.embedding = embedding
        self.regulariser = regulariser
        self.regularisation = regularisation

    def call(self, x: Any, training: bool = False) -> tuple[Any, ...]:
        """Return (reconstruction, z), and with "gp" the reconstruction's derivative along a random direction."""
        z = self.encoder(self.scale(x), training=training)
        if self.regulariser != "gp":
            return self.decoder(z, training=training), z
        reconstruction, slope = along(self.decoder, z, normal_like(z, self.noise), training)
        return reconstruction, z, slope

    def loss_and_terms(self, x: Any, outputs: Any, training: bool) -> tuple[Any, list[Any]]:
        reconstruction, z, *slope = outputs
        mse = ops.mean(ops.square(x - reconstruction))
        embedding = ops.mean(ops.sum(ops.square(z), axis=-1)) / 2
        penalty = self._penalty(*slope)
        return mse + self.embedding * embedding + self.regularisation * penalty, [mse, embedding, penalty]

    def _penalty(self, slope: Any = None) -> Any:
        if self.regulariser == "l2":
            kernels = [weight for weight in self.decoder.trainable_weights if weight.name == "kernel"]
            return sum(ops.sum(ops.square(kernel)) for kernel in kernels)
        if self.regulariser == "gp":
            return ops.mean(ops.sum(ops.square(slope), axis=(1, 2, 3)))
        return ops.zeros(())
