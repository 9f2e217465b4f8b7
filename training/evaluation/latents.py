"""Facts about the posteriors: the variance law and the inactive latents, each in two definitions.

The paper defines both by the posterior's variance; its authors' code uses the standard deviation. Both are reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from training.model.latents import ACTIVE_BELOW
from training.types import Float32Array


class Tally:
    """Accumulates posteriors and errors of reconstructed pictures."""

    def __init__(self) -> None:
        self.means: list[Float32Array] = []
        self.sds: list[Float32Array] = []
        self.squares, self.values = 0.0, 0

    def add(self, mean: Float32Array, sd: Float32Array | None, pictures: Float32Array, decoded: Float32Array) -> None:
        """Add a batch.

        Args:
            mean: Means of the posteriors, [n, latents].
            sd: Deviations of the posteriors, [n, latents]; None of a deterministic encoder.
            pictures: Pictures in [0, 1].
            decoded: What their posteriors' means are decoded to, of the same shape.
        """
        self.means.append(mean)
        if sd is not None:
            self.sds.append(sd)
        self.squares += float(np.square(pictures - decoded, dtype=np.float64).sum())
        self.values += pictures.size

    def summary(self) -> dict[str, Any]:
        """Return the mse per value (of pictures in [0, 1]), variance law, inactive latents, and facts of each latent."""
        mean = np.concatenate(self.means).astype(np.float64)
        spread = mean.var(axis=0)
        facts: dict[str, Any] = {"mse": self.squares / self.values, "latents": mean.shape[1]}
        if not self.sds:
            each = [
                {"latent": index, "mean": float(centre), "variance_of_mean": float(spread[index])}
                for index, centre in enumerate(mean.mean(axis=0))
            ]
            return {**facts, "posterior": "none: the first stage is deterministic", "per_latent": each}
        sd = np.concatenate(self.sds).astype(np.float64)
        inside, deviation = np.square(sd).mean(axis=0), sd.mean(axis=0)
        return {
            **facts,
            "posterior": "Gaussian",
            "variance_law": float(np.mean(spread + inside)),
            "variance_law_authors": float(np.mean(spread + deviation)),
            "inactive": int(np.sum(inside >= ACTIVE_BELOW)),
            "inactive_authors": int(np.sum(deviation >= ACTIVE_BELOW)),
            "per_latent": [
                {
                    "latent": index,
                    "mean": float(centre),
                    "variance_of_mean": float(spread[index]),
                    "mean_posterior_variance": float(inside[index]),
                    "active": bool(inside[index] < ACTIVE_BELOW),
                }
                for index, centre in enumerate(mean.mean(axis=0))
            ],
        }
