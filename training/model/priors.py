"""Ex-post densities: distributions fitted to the latents of a trained first stage, to sample latents from.

Every prior, the second stage and the standard normal included, is a Keras model of stock layers, noise -> latents.
So any prior goes with any first stage, and the exporter chains all of them alike.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops
from scipy.special import ndtri

from training.types import Float32Array, Float64Array


def fit(name: str, latents: Float32Array, components: int, seed: int) -> keras.Model:
    """Fit an ex-post density to latents [n, latent_dim] (Ghosh et al., section 4).

    Args:
        name: "gaussian", or "gmm": a mixture of full-covariance Gaussians.
        latents: One draw from every picture's posterior.
        components: Of the mixture.
        seed: Of the mixture's initialisation.
    """
    if name == "gaussian":
        covariance = np.cov(latents, rowvar=False, dtype=np.float64) + 1e-6 * np.eye(latents.shape[1])
        return gaussian(latents.mean(axis=0, dtype=np.float64), covariance)
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(components, covariance_type="full", reg_covar=1e-6, random_state=seed)
    mixture.fit(latents.astype(np.float64))
    return gmm(mixture.weights_, mixture.means_, mixture.covariances_)


def gaussian(mean: Float64Array, covariance: Float64Array) -> keras.Model:
    """Return noise [n, L] -> N(mean, covariance): one dense layer, by the Cholesky factor."""
    noise = keras.Input(mean.shape, name="noise")
    affine = layers.Dense(len(mean), dtype="float32", name="affine")
    model = keras.Model(noise, affine(noise), name="gaussian")
    affine.set_weights([np.linalg.cholesky(covariance).T, mean])
    return model


def gmm(weights: Float64Array, means: Float64Array, covariances: Float64Array) -> keras.Model:
    """Return noise [n, L + 1] -> a mixture: L columns for a component's Gaussian, the last to choose it.

    Component k is chosen where the last column is between the normal quantiles of the weights summed up
    to k - 1 and to k. Every component is computed, and all but the chosen one are multiplied by zero.

    Args:
        weights: [K], summing to 1.
        means: [K, L].
        covariances: [K, L, L].
    """
    count, size = means.shape
    noise = keras.Input((size + 1,), name="noise")
    every = layers.Dense(count * size, dtype="float32", name="components")
    above = layers.Dense(count - 1, dtype="float32", name="quantiles")
    chosen = layers.Dense(count, dtype="float32", name="component")
    passed = ops.cast(ops.greater(above(noise[:, size:]), 0.0), "float32")
    mask = layers.Reshape((count, 1), dtype="float32")(chosen(passed))
    samples = layers.Reshape((count, size), dtype="float32")(every(noise[:, :size]))
    model = keras.Model(noise, ops.sum(mask * samples, axis=1), name="gmm")

    factors = np.linalg.cholesky(covariances)  # [K, L, L]
    every.set_weights([factors.transpose(2, 0, 1).reshape(size, count * size), means.reshape(-1)])
    edges = ndtri(np.cumsum(weights[:-1]).clip(0, 1))
    above.set_weights([np.ones((1, count - 1)), -edges])
    # The one-hot vector of the component: with every edge passed, the 1 moves to the next component.
    moves = np.eye(count - 1, count, 1) - np.eye(count - 1, count)
    chosen.set_weights([moves, np.eye(count)[0]])
    return model
