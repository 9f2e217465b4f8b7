"""The latents of a trained encoder: their posteriors, how many of them are active, and the variance law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from training.types import Float32Array, Float64Array, IndexArray, Record

MOST_ITEMS = 500  # that a network is called with
MOST_VALUES = MOST_ITEMS * 32 * 32 * 3  # of the larger of what goes in and what comes out
ACTIVE_BELOW = 0.8  # mean posterior variance from which on a latent counts as inactive (section 3 of the paper)


@dataclass(frozen=True)
class Posteriors:
    """Stage 1's posterior of every training picture; each batch is a new draw from the posteriors of its pictures.

    Attributes:
        mean: float32 [count, latent_dim].
        sd: float32 [count, latent_dim]; 0 where stage 1 is deterministic.
    """

    mean: Float32Array
    sd: Float32Array

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: IndexArray, rng: np.random.Generator) -> Float32Array:
        """Return one draw from each posterior at `indices`."""
        mean = self.mean[indices]
        return mean + self.sd[indices] * rng.standard_normal(mean.shape, np.float32)

    def standardised(self) -> tuple[Posteriors, Float32Array, Float32Array]:
        """Return the latents as a second stage is trained on them, and their centre and spread.

        z = standardised * spread + centre. A VAE's latents have unit scale because of its KL divergence, and are not
        changed, as in the paper; a deterministic encoder's can have any scale.
        """
        if self.sd.any():
            size = self.mean.shape[1]
            return self, np.zeros(size, np.float32), np.ones(size, np.float32)
        centre, spread = self.mean.mean(axis=0), np.maximum(self.mean.std(axis=0), np.float32(1e-6))
        return Posteriors((self.mean - centre) / spread, self.sd), centre, spread

    def diagnostics(self) -> Record:
        """Return facts about the aggregate posterior, to which latent normalisation is fitted.

        Its mean is the posteriors' mean, its variance Var[mean] + mean[sd^2], latent by latent.
        """
        mean, variance = self.mean.astype(np.float64), posterior_variance(self.sd)
        return {
            **latent_summary(self.mean, self.sd),
            "definition": f"active: mean posterior variance below {ACTIVE_BELOW}",
            "posterior_variance": variance.tolist(),
            "aggregate_mean": mean.mean(axis=0).tolist(),
            "aggregate_variance": (mean.var(axis=0) + variance).tolist(),
        }


def posteriors(
    encoder: keras.Model, items: npt.NDArray[Any], input_scale: float = 1.0
) -> tuple[Float32Array, Float32Array]:
    """Return (mean, sd) of each item's posterior, each float32 [n, latent]; sd is 0 for deterministic encoders."""
    mean, *log_sd = infer(encoder, items, input_scale)
    return mean, np.exp(log_sd[0]) if log_sd else np.zeros_like(mean)


def infer(network: keras.Model, items: npt.NDArray[Any], input_scale: float = 1.0) -> list[npt.NDArray[Any]]:
    """Return each of a network's outputs for all items, which it sees in float32, divided by their scale.

    The network is called, which keeps all that its layers make: so large pictures are few at a time. `predict` of a
    network that was built for several devices would share the items out among them, and on several machines wait for
    the others.
    """
    values = max(math.prod(each.shape[1:]) for each in (items, *network.outputs))
    size = min(MOST_ITEMS, max(1, MOST_VALUES // values))
    parts = []
    for at in range(0, len(items), size):
        some = items[at : at + size].astype(np.float32) / np.float32(input_scale)
        outputs = keras.tree.flatten(network(some, training=False))
        parts.append([keras.ops.convert_to_numpy(each) for each in outputs])
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def squared_error(items: npt.NDArray[Any], input_scale: float, decoded: Float32Array) -> float:
    """Return the mean squared error of items, divided by their scale, as they were decoded: in little memory."""
    sums = [
        np.sum(np.square(item.astype(np.float32) / np.float32(input_scale) - one), dtype=np.float64)
        for item, one in zip(items, decoded, strict=True)
    ]
    return float(np.sum(sums) / decoded.size)


def posterior_variance(sd: Float32Array) -> Float64Array:
    """Return each latent's mean posterior variance, float64 [latent], of deviations [n, latent]."""
    variance: Float64Array = np.mean(np.square(sd, dtype=np.float64), axis=0)
    return variance


def latent_summary(mean: Float32Array, sd: Float32Array) -> Record:
    """Return how many latents are active, and their mean total variance, which is 1 where the variance law holds.

    A deterministic encoder's latents are neither active nor inactive, and are not counted.
    """
    variance = posterior_variance(sd)
    law = float(np.mean(np.var(mean, axis=0, dtype=np.float64) + variance))
    active = {"active": int(np.sum(variance < ACTIVE_BELOW))} if sd.any() else {}
    return {**active, "latents": int(mean.shape[1]), "variance_law": law}
