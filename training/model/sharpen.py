"""Sharpening: a trained decoder learns to please a critic, which learns to tell its pictures from real ones.

This is ours, and no part of the paper. A squared error makes a decoder return the mean of all pictures that a latent
may stand for, and a mean is soft. Here the decoder alone is trained on, so that latents, priors and the cost of a
sample stay as they are, with three terms:

adversarial   the critic's verdict on reconstructions and on samples of the prior: a hinge loss (Miyato et al., Spectral
              Normalization for GANs, 2018), under random changes that real pictures undergo too, as pictures are few
              (Zhao et al., Differentiable Augmentation, 2020)
matching      how far a reconstruction is from its picture in the critic's features (Larsen et al., Autoencoding beyond
              pixels using a learned similarity metric, 2016)
mse           the likelihood's part, which keeps reconstructions near their pictures

What is kept is the average of the decoder's weights over the last steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import keras
import numpy as np
from keras import layers, ops

from training.model.autoencoder import Autoencoder, Options
from training.model.networks import seeded
from training.model.normalise import Normalisation
from training.model.replicas import normal_like
from training.model.spectral import SpectrallyNormalised
from training.recipe import Recipe

LEAST_SIDE = 4  # of the critic's last features
SHIFT = 8  # pictures are moved by up to this part of their side


def critic_network(recipe: Recipe) -> keras.Model:
    """Return the critic: images [n, side, side, channels] in [0, 1] -> scores [n, 1], and features of each size.

    Residual blocks with spectral normalisation. Sizes are halved by averages of 2x2 and not by strides: gradients
    through strides have a grid of their own, which a decoder then learns.
    """
    width, dtype, side = recipe.critic_dim, recipe.precision, recipe.side

    def conv(x: Any, channels: int, size: int, name: str) -> Any:
        return SpectrallyNormalised(layers.Conv2D(channels, size, padding="same", dtype=dtype, name=name))(x)

    def rectified(x: Any, name: str) -> Any:
        return layers.LeakyReLU(0.2, dtype=dtype, name=name)(x)

    images = keras.Input((side, side, recipe.channels), name="images")
    x = layers.Rescaling(2.0, -1.0, dtype=dtype, name="centred")(images)
    x = conv(x, width, 3, "stem")
    features = []
    while side > LEAST_SIDE:
        y = conv(rectified(x, f"relu{side}_0"), width, 3, f"conv{side}_0")
        y = conv(rectified(y, f"relu{side}_1"), 2 * width, 3, f"conv{side}_1")
        x = layers.Add(dtype=dtype, name=f"add{side}")([y, conv(x, 2 * width, 1, f"shortcut{side}")])
        features.append(x)
        x = layers.AveragePooling2D(2, dtype=dtype, name=f"halve{side}")(x)
        side, width = side // 2, min(2 * width, 8 * recipe.critic_dim)
    x = conv(rectified(x, "relu"), width, 3, "conv")
    x = layers.Flatten(dtype=dtype, name="flat")(rectified(x, "relu_last"))
    scores = SpectrallyNormalised(layers.Dense(1, dtype="float32", name="score"))(x)
    return seeded(images, [scores, *features], "critic", recipe.seed, 3)


class Sharpener(Autoencoder):
    """Trains a decoder and a critic against each other; encoder and prior stay as they are.

    loss = critic + adversarial + feature_matching * matching + pixel_matching * mse / error

    Args:
        encoder: x -> statistics of the latent, each [n, latent].
        decoder: z [n, latent] -> images; batch norm keeps its running statistics.
        prior: noise [n, size] -> latents.
        normalisation: Of these latents.
        critic: images -> scores [n, 1], and features.
        error: Mean squared error of reconstructions before, the unit of the pixels' term.
        feature_matching: Weight.
        pixel_matching: Weight.
        averaging: What a step keeps of the average of the decoder's weights.
        options: input_scale, seed and dtype, as Autoencoder takes them.
    """

    TERMS = ("mse", "matching", "adversarial", "critic")

    def __init__(
        self,
        encoder: keras.Model,
        decoder: keras.Model,
        prior: keras.Model,
        normalisation: Normalisation,
        critic: keras.Model,
        error: float,
        feature_matching: float,
        pixel_matching: float,
        averaging: float,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(encoder, decoder, **options)
        encoder.trainable = prior.trainable = False
        self.prior, self.critic = prior, critic
        self.feature_matching, self.pixel_matching = feature_matching, pixel_matching
        # What was measured is data and no part of the program, which then is found compiled by every run of a recipe.
        self.error, self.factor, self.shift = (
            self._measured(name, value)
            for name, value in (("error", error), ("factor", normalisation.scale), ("shift", normalisation.shift))
        )
        self.average = _Average(decoder.trainable_variables, averaging)

    def _measured(self, name: str, value: Any) -> Any:
        weight = self.add_weight(name=name, shape=np.shape(value), initializer="zeros", trainable=False, autocast=False)
        weight.assign(value)
        return weight

    def call(self, x: Any, training: bool = False) -> tuple[Any, Any]:
        """Return reconstructions of x, from draws of its posterior, and as many samples of the prior."""
        z, *log_sd = keras.tree.flatten(self.encoder(self.scale(x), training=False))
        if log_sd:
            z = z + ops.exp(log_sd[0]) * normal_like(z, self.noise)
        size = self.prior.input_shape[-1]
        noise = keras.random.normal((ops.shape(z)[0], size), seed=self.noise)
        drawn = self.prior(noise, training=False) * self.factor + self.shift
        both = self.decoder(ops.concatenate([z, drawn]), training=False)
        count = ops.shape(z)[0]
        return both[:count], both[count:]

    def loss_and_terms(self, x: Any, outputs: Any, training: bool) -> tuple[Any, list[Any]]:
        decoded, drawn = outputs
        count = ops.shape(x)[0]
        change = _Change(x, self.noise)
        real, fake = change(x), ops.concatenate([change(decoded), change(drawn)])
        # The critic learns in the first pass, from pictures that are constants; the decoder in the second, from a
        # critic that is one.
        scores, *features = self.critic(ops.stop_gradient(ops.concatenate([real, fake])), training=training)
        critic = ops.mean(ops.relu(1 - scores[:count])) + ops.mean(ops.relu(1 + scores[count:]))
        scores, *seen = self._constant_critic(fake)
        adversarial = -ops.mean(scores)
        distances = [
            _distance(ours[:count], ops.stop_gradient(theirs[:count]))
            for ours, theirs in zip(seen, features, strict=True)
        ]
        matching = sum(distances) / len(distances)
        mse = ops.mean(ops.square(x - decoded))
        if training:
            self.average.update()
        loss = critic + adversarial + self.feature_matching * matching + self.pixel_matching * mse / self.error
        return loss, [mse, matching, adversarial, critic]

    def _constant_critic(self, images: Any) -> list[Any]:
        """Return what the critic makes of images, with no gradient for its weights."""
        weights = [ops.stop_gradient(each) for each in self.critic.trainable_variables]
        others = [ops.convert_to_tensor(each) for each in self.critic.non_trainable_variables]
        outputs, _ = self.critic.stateless_call(weights, others, images, training=False)
        return list(outputs)

    def keep(self, decoder: keras.Model) -> None:
        """Give a decoder of the same layers the average of the weights."""
        for layer in decoder.layers:
            layer.set_weights(self.decoder.get_layer(layer.name).get_weights())
        for variable, average in zip(decoder.trainable_variables, self.average.values, strict=True):
            variable.assign(average)


def _distance(features: Any, wanted: Any) -> Any:
    """Return the mean absolute difference, over the mean absolute value of what is wanted."""
    features, wanted = ops.cast(features, "float32"), ops.cast(wanted, "float32")
    return ops.mean(ops.abs(features - wanted)) / (ops.mean(ops.abs(wanted)) + 1e-6)


class _Average(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """The exponential average of variables over training steps; it forgets what they began with within a few.

    Keras' optimizers average too, but put the average in the weights' place whenever `fit` returns, which here is at
    the end of any piece of an epoch.
    """

    def __init__(self, variables: list[Any], keep: float) -> None:
        super().__init__(trainable=False)
        self.share = keep
        self._variables: Callable[[], list[Any]] = lambda: variables  # a list would be taken for weights of this layer
        self.values = [
            self.add_weight(name=f"average_{index}", shape=each.shape, initializer="zeros", trainable=False)
            for index, each in enumerate(variables)
        ]
        for value, each in zip(self.values, variables, strict=True):
            value.assign(ops.convert_to_numpy(each))  # a copy: JAX gives the buffers of both away, each once
        self.steps = self.add_weight(name="steps", shape=(), initializer="zeros", trainable=False)
        self.built = True

    def update(self) -> None:
        """Move the average towards the variables, by a step."""
        share = ops.minimum(self.share, (1 + self.steps) / (10 + self.steps))
        for value, each in zip(self.values, self._variables(), strict=True):
            value.assign(share * value + (1 - share) * ops.stop_gradient(each))
        self.steps.assign(self.steps + 1)


class _Change:
    """Random changes of place, brightness, saturation and contrast, drawn once, for pictures [n, side, side, c]."""

    def __init__(self, like: Any, seed: keras.random.SeedGenerator) -> None:
        count, side = ops.shape(like)[0], like.shape[1]

        def uniform(least: float, most: float) -> Any:
            return keras.random.uniform((count, 1, 1, 1), least, most, seed=seed)

        self.brightness, self.saturation, self.contrast = uniform(-0.25, 0.25), uniform(0, 2), uniform(0.5, 1.5)
        self.down, self.right = (_moves(uniform(-0.5, 0.5), side) for _ in range(2))

    def __call__(self, pictures: Any) -> Any:
        """Return the pictures, changed; what is moved in is black."""
        pictures = pictures + self.brightness
        grey = ops.mean(pictures, axis=-1, keepdims=True)
        pictures = grey + self.saturation * (pictures - grey)
        level = ops.mean(pictures, axis=(1, 2, 3), keepdims=True)
        pictures = level + self.contrast * (pictures - level)
        pictures = ops.einsum("nij,njwc->niwc", self.down, pictures)
        return ops.einsum("nij,nhjc->nhic", self.right, pictures)


def _moves(shares: Any, side: int) -> Any:
    """Return matrices [n, side, side] that move columns by up to side / SHIFT, for shares [n, 1, 1, 1] of that."""
    by = ops.round(ops.squeeze(shares, -1) * (2 * side / SHIFT))
    places = ops.arange(side, dtype="float32")
    return ops.cast(ops.equal(places[None, :, None] + by, places[None, None, :]), "float32")
