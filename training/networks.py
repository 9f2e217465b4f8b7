"""The networks of both stages, as in figure 1 of the paper (the ResNet of Dai & Wipf 2019).

Every encoder gives (mean, log_sd) of the posterior; every decoder gives a reconstruction. Heads
compute in float32 whatever the precision policy, so that losses and pixels never lose range.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from training.recipes import Recipe

WIDEST = 1024  # the decoder doubles its width per halving up to here


def _conv(width: int, recipe: Recipe, l2: float = 0.0, **options: Any) -> layers.Conv2D:
    regularizer = keras.regularizers.L2(l2) if l2 else None
    return layers.Conv2D(width, recipe.kernel, padding="same", kernel_regularizer=regularizer, **options)


def _scale_block(x: Any, width: int, recipe: Recipe, name: str) -> Any:
    """`blocks_per_scale` residual blocks: (batch norm, ReLU, conv) x depth, plus a convolved shortcut."""
    for block in range(recipe.blocks_per_scale):
        y = x
        for depth in range(recipe.depth_per_block):
            at = f"{name}_{block}_{depth}"
            y = layers.BatchNormalization(momentum=recipe.batch_norm_momentum, epsilon=1e-5, name=f"{at}_norm")(y)
            y = layers.ReLU(name=f"{at}_relu")(y)
            y = _conv(width, recipe, name=f"{at}_conv")(y)
        shortcut = _conv(width, recipe, name=f"{name}_{block}_shortcut")(x)
        x = layers.Add(name=f"{name}_{block}_add")([y, shortcut])
    return x


def _posterior(x: Any, latent_dim: int) -> list[Any]:
    return [
        layers.Dense(latent_dim, dtype="float32", name="mean")(x),
        layers.Dense(latent_dim, dtype="float32", name="log_sd")(x),
    ]


def image_encoder(recipe: Recipe) -> keras.Model:
    """Stage 1's encoder: images [n, side, side, channels] in [0, 1] -> mean, log_sd, each [n, latent_dim]."""
    images = keras.Input((recipe.side, recipe.side, recipe.channels), name="images")
    width = recipe.base_dim
    x = _conv(width, recipe, name="stem")(images)
    for scale in range(recipe.num_scale):
        x = _scale_block(x, width, recipe, f"scale{scale}")
        if scale < recipe.num_scale - 1:
            width *= 2
            x = _conv(width, recipe, recipe.l2, strides=2, name=f"down{scale}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    y = x
    for depth in range(2):
        y = layers.ReLU(name=f"fc_{depth}_relu")(y)
        y = layers.Dense(recipe.fc_dim, name=f"fc_{depth}")(y)
    x = layers.Add(name="fc_add")([y, layers.Dense(recipe.fc_dim, name="fc_shortcut")(x)])
    return keras.Model(images, _posterior(x, recipe.latent_dim), name="encoder")


def image_decoder(recipe: Recipe) -> keras.Model:
    """Stage 1's decoder: latents [n, latent_dim] -> images [n, side, side, channels] in [0, 1]."""
    latents = keras.Input((recipe.latent_dim,), name="latents")

    def width(side: int) -> int:
        return min(recipe.base_dim * recipe.side // side, WIDEST)

    side = 2
    x = layers.Dense(side * side * width(side), name="stem")(latents)
    x = layers.Reshape((side, side, width(side)), name="grid")(x)
    while side < recipe.side:
        side *= 2
        x = layers.Conv2DTranspose(
            width(side),
            recipe.kernel,
            strides=2,
            padding="same",
            kernel_regularizer=keras.regularizers.L2(recipe.l2) if recipe.l2 else None,
            name=f"up{side}",
        )(x)
        x = _scale_block(x, width(side), recipe, f"scale{side}")
    x = _conv(recipe.channels, recipe, name="pixels")(x)
    x = layers.Activation("sigmoid", dtype="float32", name="images")(x)
    return keras.Model(latents, x, name="decoder")


def _dense_stack(x: Any, recipe: Recipe) -> Any:
    """`second_depth` dense ReLU layers, then what came in beside what came out."""
    y = x
    for depth in range(recipe.second_depth):
        y = layers.Dense(recipe.second_dim, activation="relu", name=f"dense_{depth}")(y)
    return layers.Concatenate(name="skip")([x, y])


def latent_encoder(recipe: Recipe) -> keras.Model:
    """Stage 2's encoder: latents [n, latent_dim] -> mean, log_sd, each [n, latent_dim]."""
    latents = keras.Input((recipe.latent_dim,), name="latents")
    return keras.Model(latents, _posterior(_dense_stack(latents, recipe), recipe.latent_dim), name="encoder")


def latent_decoder(recipe: Recipe) -> keras.Model:
    """Stage 2's decoder: noise [n, latent_dim] -> latents [n, latent_dim]."""
    noise = keras.Input((recipe.latent_dim,), name="noise")
    latents = layers.Dense(recipe.latent_dim, dtype="float32", name="latents")(_dense_stack(noise, recipe))
    return keras.Model(noise, latents, name="decoder")
