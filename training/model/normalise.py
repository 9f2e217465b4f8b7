"""Latent normalisation: scale second-stage samples to the variance of the aggregate posterior.

A VAE's samples vary less than its data, so stage 1's decoder would see latents too near to their mean (the paper,
last row of its results). The paper rescales each batch by that batch's statistics. A service cannot, as a sample
would then depend on the others of its batch: here the constants are fitted once, on many samples, and stored.

The paper's factor is the root of the aggregate posterior's mean variance over the mean *deviation* of generated
latents. These two compare only where all deviations are equal: of latents that have the right variance already,
with deviations .3, .5, 1 and 2, the paper's factor is 1.22 and not 1. Here both are roots of mean variances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from training.types import Float32Array

MODES = ("none", "scalar", "per-dimension")
DRAWS = 100_000
EVIDENT = 0.25  # loss of variance above which the paper's code normalises


@dataclass(frozen=True)
class Normalisation:
    """The map z -> z * scale + shift, latent by latent.

    Attributes:
        mode: One of MODES.
        scale: float32 [latent_dim].
        shift: float32 [latent_dim].
        draws: Samples it was fitted on.
    """

    mode: str
    scale: Float32Array
    shift: Float32Array
    draws: int

    def card(self) -> dict[str, Any]:
        """Return the map as a bundle's card has it; scalar normalisation as a single number."""
        if self.mode == "none":
            return {"mode": self.mode}
        if self.mode == "scalar":
            return {"mode": self.mode, "scale": float(self.scale[0]), "draws": self.draws}
        return {"mode": self.mode, "scale": self.scale.tolist(), "shift": self.shift.tolist(), "draws": self.draws}


def fit(mode: str, latents: Float32Array, mean: list[float], variance: list[float]) -> Normalisation:
    """Fit the constants that take generated latents to the aggregate posterior.

    Args:
        mode: "none"; "scalar": one factor, which gives generated latents the aggregate posterior's mean
            variance; "per-dimension": every latent's mean and deviation matched.
        latents: Generated latents, float32 [draws, latent_dim].
        mean: The aggregate posterior's mean, latent by latent.
        variance: The aggregate posterior's variance, latent by latent.
    """
    wanted_mean, wanted_variance = np.array(mean), np.array(variance)
    size = latents.shape[1]
    generated = np.maximum(latents.var(axis=0, dtype=np.float64), 1e-12)
    scale, shift = np.ones(size), np.zeros(size)
    if mode == "scalar":
        scale = np.full(size, np.sqrt(wanted_variance.mean() / generated.mean()))
    elif mode == "per-dimension":
        scale = np.sqrt(wanted_variance / generated)
        shift = wanted_mean - latents.mean(axis=0, dtype=np.float64) * scale
    return Normalisation(mode, scale.astype(np.float32), shift.astype(np.float32), len(latents))


def variance_loss(latents: Float32Array, known: dict[str, Any], error: float, standardised: bool) -> float:
    """Return how much less generated latents vary than the posteriors' means, in units of stage 2's error.

    That is (mean_i Var[mean_i] - mean_i Var[z_i]) / mse. The paper's code normalises where it is above EVIDENT.

    Args:
        latents: Generated latents, float32 [draws, latent_dim].
        known: The run's diagnostics.
        error: Stage 2's last mse.
        standardised: Whether stage 2 was trained on standardised latents, and the mse is in their units.
    """
    total, inside = np.array(known["aggregate_variance"]), np.array(known["posterior_variance"])
    lost = total - inside - latents.var(axis=0, dtype=np.float64)
    return float(np.mean(lost / total if standardised else lost) / error)
