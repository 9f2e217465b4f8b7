"""Build both stages as a recipe describes them, and turn them into what is kept: stock Keras layers in float32."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np

from training.model import networks
from training.model.autoencoder import RAE, VAE, Autoencoder, Options
from training.model.balance import policy
from training.model.normalise import Normalisation
from training.model.sharpen import Sharpener, critic_network
from training.model.spectral import SpectrallyNormalised
from training.recipe import Recipe
from training.types import Float32Array

IMAGE_SCALE = 255.0  # the value of a uint8 image that stands for 1


def image_autoencoder(recipe: Recipe, steps: int = 1) -> Autoencoder:
    """Return stage 1 over uint8 images, variational or deterministic; `steps` is the minibatches an epoch."""
    kind, _, regulariser = recipe.first_stage.partition("-")
    encoder, decoder = networks.image_encoder(recipe), networks.image_decoder(recipe, spectral=regulariser == "sn")
    options: Options = {"input_scale": IMAGE_SCALE, "seed": recipe.seed, "dtype": recipe.precision}
    if kind == "vae":
        return VAE(encoder, decoder, policy(recipe, 1, steps), kl_weight=recipe.k, **options)
    embedding = recipe.embedding if kind == "rae" else 0.0
    return RAE(encoder, decoder, embedding, regulariser, recipe.regularisation, **options)


def latent_vae(recipe: Recipe, steps: int = 1) -> VAE:
    """Return stage 2: a VAE over stage 1's latents."""
    balance = policy(recipe, 2, steps)
    return VAE(networks.latent_encoder(recipe), networks.latent_decoder(recipe), balance, seed=recipe.seed)


def sharpener(
    recipe: Recipe, first: keras.Model, prior: keras.Model, normalisation: Normalisation, error: float
) -> Sharpener:
    """Return what sharpens a decoder.

    Args:
        recipe: Of the run.
        first: Its stage 1, as it is kept.
        prior: noise -> latents.
        normalisation: Of these latents.
        error: Mean squared error of stage 1's reconstructions.
    """
    encoder, decoder = networks.image_encoder(recipe), image_decoder(recipe, recipe.precision)
    for ours in (encoder, decoder):
        for layer in ours.layers:
            layer.set_weights(first.get_layer(ours.name).get_layer(layer.name).get_weights())
    weights = recipe.feature_matching, recipe.pixel_matching, recipe.averaging
    options: Options = {"input_scale": IMAGE_SCALE, "seed": recipe.seed, "dtype": recipe.precision}
    return Sharpener(encoder, decoder, prior, normalisation, critic_network(recipe), error, *weights, **options)


def image_decoder(recipe: Recipe, precision: str = "float32") -> keras.Model:
    """Return a decoder as stage 1 has it, for other losses: without regularisation."""
    return networks.image_decoder(replace(recipe, precision=precision, l2_up=0.0, l2_scale=0.0))


def in_units_of(vae: VAE, centre: Float32Array, spread: Float32Array) -> None:
    """Change the weights of a second stage that was trained on (z - centre) / spread, so that it takes and gives z."""
    size = len(centre)
    for name in ("dense_0", "mean", "log_sd"):
        layer = vae.encoder.get_layer(name)
        kernel, bias = layer.get_weights()
        scaled = kernel[:size] / spread[:, None]  # the heads' other rows take what the dense layers made of z
        layer.set_weights([np.concatenate([scaled, kernel[size:]]), bias - centre @ scaled])
    layer = vae.decoder.get_layer("latents")
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel * spread, bias * spread + centre])


def plain_images(model: Autoencoder, recipe: Recipe) -> keras.Model:
    """Return stage 1's networks as they are kept: in float32, and without spectral normalisation's wrappers."""
    unwrapped = "vae" if isinstance(model, VAE) else "ae"
    like = image_autoencoder(replace(recipe, precision="float32", first_stage=unwrapped))
    for ours, theirs in ((like.encoder, model.encoder), (like.decoder, model.decoder)):
        for layer in ours.layers:
            trained = theirs.get_layer(layer.name)
            divided = isinstance(trained, SpectrallyNormalised)
            layer.set_weights(trained.plain_weights() if divided else trained.get_weights())
    return plain(like.encoder, like.decoder)


def plain(encoder: keras.Model, decoder: keras.Model) -> keras.Model:
    """Return networks as one model of stock Keras layers: x -> [decoded mean, and the encoder's outputs ...]."""
    x = keras.Input(encoder.input_shape[1:], name="x")
    statistics = encoder(x)
    statistics = list(statistics) if isinstance(statistics, list | tuple) else [statistics]
    return keras.Model(x, [decoder(statistics[0]), *statistics], name="autoencoder")
