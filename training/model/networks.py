"""The networks of both stages, as in figure 1 of the paper (the ResNet of Dai & Wipf 2019).

A variational encoder gives (mean, log_sd) of the posterior, a deterministic one the latent; every decoder
gives a reconstruction. The recipe alone sets the layers' precision and the seed of their weights; Keras' global
settings have no effect. Heads compute in float32 whatever the precision, so that losses and pixels keep their
range; so does all of stage 2, which is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from training.model.spectral import SpectrallyNormalised
from training.recipe import Recipe

WIDEST = 1024  # the decoder's channels double with every halving of the side, up to this

Wrap = Callable[[layers.Layer], layers.Layer]


def _bare(layer: layers.Layer) -> layers.Layer:
    return layer


def seeded(inputs: Any, outputs: Any, name: str, *seed: int) -> keras.Model:
    """Return a network whose kernels, and initial vectors of spectral norms, are drawn from a seed of its own."""
    network = keras.Model(inputs, outputs, name=name)
    rng = np.random.default_rng([*seed, *name.encode()])
    for weight in network.weights:
        if weight.name in ("kernel", "vector_u"):
            weight.assign(keras.initializers.GlorotUniform(int(rng.integers(2**31)))(weight.shape))
    return network


def _options(recipe: Recipe, l2: float) -> dict[str, Any]:
    regularizer = keras.regularizers.L2(l2) if l2 else None
    return {
        "kernel_size": recipe.kernel,
        "padding": "same",
        "kernel_regularizer": regularizer,
        "dtype": recipe.precision,
    }


def _conv(width: int, recipe: Recipe, name: str, l2: float = 0.0, strides: int = 1) -> layers.Layer:
    return layers.Conv2D(width, strides=strides, name=name, **_options(recipe, l2))


def _scale_block(x: Any, width: int, recipe: Recipe, name: str, l2: float = 0.0, wrap: Wrap = _bare) -> Any:
    """`blocks_per_scale` residual blocks: (batch norm, ReLU, conv) x depth, plus a convolved shortcut."""
    dtype, momentum = recipe.precision, recipe.batch_norm_momentum
    for block in range(recipe.blocks_per_scale):
        y = x
        for depth in range(recipe.depth_per_block):
            at = f"{name}_{block}_{depth}"
            y = layers.BatchNormalization(momentum=momentum, epsilon=1e-5, dtype=dtype, name=f"{at}_norm")(y)
            y = layers.ReLU(dtype=dtype, name=f"{at}_relu")(y)
            y = wrap(_conv(width, recipe, f"{at}_conv", l2))(y)
        shortcut = wrap(_conv(width, recipe, f"{name}_{block}_shortcut", l2))(x)
        x = layers.Add(dtype=dtype, name=f"{name}_{block}_add")([y, shortcut])
    return x


def _posterior(x: Any, latent_dim: int) -> list[Any]:
    return [
        layers.Dense(latent_dim, dtype="float32", name="mean")(x),
        layers.Dense(latent_dim, dtype="float32", name="log_sd")(x),
    ]


def image_encoder(recipe: Recipe) -> keras.Model:
    """Stage 1's encoder: images [n, side, side, channels] in [0, 1] -> mean, log_sd or latent, [n, latent_dim]."""
    images = keras.Input((recipe.side, recipe.side, recipe.channels), name="images")
    width, dtype = recipe.base_dim, recipe.precision
    x = _conv(width, recipe, "stem")(images)
    for scale in range(recipe.num_scale):
        x = _scale_block(x, width, recipe, f"scale{scale}")
        if scale < recipe.num_scale - 1:
            width *= 2
            x = _conv(width, recipe, f"down{scale}", recipe.l2_down, strides=2)(x)
    x = layers.GlobalAveragePooling2D(dtype=dtype, name="pool")(x)
    y = x
    for depth in range(2):
        y = layers.ReLU(dtype=dtype, name=f"fc_{depth}_relu")(y)
        y = layers.Dense(recipe.fc_dim, dtype=dtype, name=f"fc_{depth}")(y)
    shortcut = layers.Dense(recipe.fc_dim, dtype=dtype, name="fc_shortcut")(x)
    x = layers.Add(dtype=dtype, name="fc_add")([y, shortcut])
    statistics = _posterior(x, recipe.latent_dim)
    return seeded(images, statistics if recipe.first_stage == "vae" else statistics[:1], "encoder", recipe.seed, 1)


def image_decoder(recipe: Recipe, spectral: bool = False) -> keras.Model:
    """Stage 1's decoder: latents [n, latent_dim] -> images [n, side, side, channels] in [0, 1].

    Args:
        recipe: Gives the sizes.
        spectral: Whether every kernel is divided by its spectral norm as it trains (RAE-SN).
    """
    wrap, dtype = SpectrallyNormalised if spectral else _bare, recipe.precision
    latents = keras.Input((recipe.latent_dim,), name="latents")

    def width(side: int) -> int:
        return min(recipe.base_dim * recipe.side // side, WIDEST)

    side = 2
    x = wrap(layers.Dense(side * side * width(side), dtype=dtype, name="stem"))(latents)
    x = layers.Reshape((side, side, width(side)), dtype=dtype, name="grid")(x)
    while side < recipe.side:
        side *= 2
        up = layers.Conv2DTranspose(width(side), strides=2, name=f"up{side}", **_options(recipe, recipe.l2_up))
        x = _scale_block(wrap(up)(x), width(side), recipe, f"scale{side}", recipe.l2_scale, wrap)
    x = wrap(_conv(recipe.channels, recipe, "pixels"))(x)
    x = layers.Activation("sigmoid", dtype="float32", name="images")(x)
    return seeded(latents, x, "decoder", recipe.seed, 1)


def _dense_stack(x: Any, recipe: Recipe) -> Any:
    """`second_depth` dense ReLU layers; their input is concatenated with their output."""
    y = x
    for depth in range(recipe.second_depth):
        y = layers.Dense(recipe.second_dim, activation="relu", dtype="float32", name=f"dense_{depth}")(y)
    return layers.Concatenate(dtype="float32", name="skip")([x, y])


def latent_encoder(recipe: Recipe) -> keras.Model:
    """Stage 2's encoder: latents [n, latent_dim] -> mean, log_sd, each [n, latent_dim]."""
    latents = keras.Input((recipe.latent_dim,), name="latents")
    posterior = _posterior(_dense_stack(latents, recipe), recipe.latent_dim)
    return seeded(latents, posterior, "encoder", recipe.seed, 2)


def latent_decoder(recipe: Recipe) -> keras.Model:
    """Stage 2's decoder: noise [n, latent_dim] -> latents [n, latent_dim]."""
    noise = keras.Input((recipe.latent_dim,), name="noise")
    latents = layers.Dense(recipe.latent_dim, dtype="float32", name="latents")(_dense_stack(noise, recipe))
    return seeded(noise, latents, "decoder", recipe.seed, 2)
