"""Latent normalisation: give second-stage samples the variance that the aggregate posterior has.

A VAE's samples vary less than its data, so stage 1's decoder would see latents from too near the middle
(the paper, last row of its results). The paper rescales each batch by its own statistics; a service
cannot, as a sample would then depend on its neighbours. Here the constants are fitted once, on many
samples, and stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MODES = ("none", "scalar", "per-dimension")
DRAWS = 100_000

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Normalisation:
    """z -> z * scale + shift, latent by latent.

    Attributes:
        mode: One of MODES.
        scale: float32 [latent_dim].
        shift: float32 [latent_dim].
        draws: Samples it was fitted on.
    """

    mode: str
    scale: Floats
    shift: Floats
    draws: int

    def card(self) -> dict[str, Any]:
        """Return what a bundle's card says of it: a single number where one number is all there is."""
        if self.mode == "none":
            return {"mode": self.mode}
        if self.mode == "scalar":
            return {"mode": self.mode, "scale": float(self.scale[0]), "draws": self.draws}
        return {"mode": self.mode, "scale": self.scale.tolist(), "shift": self.shift.tolist(), "draws": self.draws}


def fit(mode: str, latents: Floats, mean: list[float], variance: list[float]) -> Normalisation:
    """Fit the constants that take generated latents to the aggregate posterior.

    Args:
        mode: "none"; "scalar", the paper's: one factor, the root of the mean variance over the mean
            deviation of generated latents; "per-dimension": every latent's mean and deviation matched.
        latents: Generated latents, float32 [draws, latent_dim].
        mean: The aggregate posterior's mean, latent by latent.
        variance: The aggregate posterior's variance, latent by latent.
    """
    wanted_mean, wanted_variance = np.array(mean), np.array(variance)
    size = latents.shape[1]
    deviation = latents.std(axis=0, dtype=np.float64)
    scale, shift = np.ones(size), np.zeros(size)
    if mode == "scalar":
        scale = np.full(size, np.sqrt(wanted_variance.mean()) / deviation.mean())
    elif mode == "per-dimension":
        scale = np.sqrt(wanted_variance) / np.maximum(deviation, 1e-6)
        shift = wanted_mean - latents.mean(axis=0, dtype=np.float64) * scale
    return Normalisation(mode, scale.astype(np.float32), shift.astype(np.float32), len(latents))
