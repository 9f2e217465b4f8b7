"""Facts about the posteriors: the variance law and the inactive latents, each in two definitions.

The paper defines both by the posterior's variance; its authors' code uses the standard deviation. Both are reported.
"""

from __future__ import annotations

import numpy as np

from training.model.latents import ACTIVE_BELOW, posterior_variance
from training.types import Float32Array, Record


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

    def summary(self) -> Record:
        """Return the mse per value of pictures in [0, 1], the variance law, inactive latents, and facts of each."""
        mean = np.concatenate(self.means).astype(np.float64)
        spread = mean.var(axis=0)
        facts: Record = {"mse": self.squares / self.values, "latents": mean.shape[1]}
        each: list[Record] = [
            {"latent": index, "mean": float(centre), "variance_of_mean": float(variance)}
            for index, (centre, variance) in enumerate(zip(mean.mean(axis=0), spread, strict=True))
        ]
        if not self.sds:
            return {**facts, "posterior": "none: the first stage is deterministic", "per_latent": each}
        sd = np.concatenate(self.sds)
        inside, deviation = posterior_variance(sd), sd.mean(axis=0, dtype=np.float64)
        for latent, variance in zip(each, inside, strict=True):
            latent |= {"mean_posterior_variance": float(variance), "active": bool(variance < ACTIVE_BELOW)}
        return {
            **facts,
            "posterior": "Gaussian",
            "variance_law": float(np.mean(spread + inside)),
            "variance_law_authors": float(np.mean(spread + deviation)),
            "inactive": int(np.sum(inside >= ACTIVE_BELOW)),
            "inactive_authors": int(np.sum(deviation >= ACTIVE_BELOW)),
            "per_latent": each,
        }
