"""Reconstructions and samples of a run, in batches.

Noise follows the noise contract (docs/noise.md), so that a run and the bundle made of it are measured on the same
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import keras
import numpy as np

from serve.noise import SEEDS, draw
from training.errors import RunError
from training.evaluation.latents import Tally
from training.model.autoencoder import xla
from training.model.build import IMAGE_SCALE
from training.model.normalise import DRAWS, Normalisation, fit
from training.record.grids import to_uint8
from training.record.run import Run
from training.types import Float32Array, UInt8Array


class FirstStage:
    """A first stage's encoder, and its own decoder or another, applied to batches."""

    def __init__(self, networks: keras.Model, decoder: keras.Model | None = None) -> None:
        self.encoder, self.decoder = networks.get_layer("encoder"), decoder or networks.get_layer("decoder")
        self.encoder.jit_compile = self.decoder.jit_compile = xla()

    def reconstruct(self, batches: Iterable[UInt8Array], tally: Tally) -> Iterator[UInt8Array]:
        """Yield each picture decoded from its posterior's mean, and add posteriors and errors to the tally."""
        for images in batches:
            pictures = images.astype(np.float32) / np.float32(IMAGE_SCALE)
            mean, *log_sd = keras.tree.flatten(self.encoder.predict_on_batch(pictures))
            decoded = self.decoder.predict_on_batch(mean)
            tally.add(mean, np.exp(log_sd[0]) if log_sd else None, pictures, decoded)
            yield to_uint8(decoded)

    def decode(self, batches: Iterable[Float32Array]) -> Iterator[UInt8Array]:
        """Yield the pictures that latents are decoded to."""
        for latents in batches:
            yield to_uint8(self.decoder.predict_on_batch(latents))


class LatentSampler:
    """Samples latents from one of a run's priors.

    Args:
        run: A finished run.
        name: The name of the prior.
        noisy: Whether to add the noise of the second stage's likelihood to its samples, as Dai & Wipf do.

    Attributes:
        gamma: The deviation of that noise: the second stage's last gamma, or 0 without noise.

    Raises:
        RunError: the run lacks the prior, or the history that holds gamma.
    """

    def __init__(self, run: Run, name: str, noisy: bool = False) -> None:
        self.run, self.name = run, name
        self.model = run.prior(name)
        self.model.jit_compile = xla()
        self.gamma = _last_gamma(run) if noisy and name == "second-stage" else 0.0

    def latents(
        self, seed: int, count: int, batch: int, normalisation: Normalisation | None = None
    ) -> Iterator[Float32Array]:
        """Yield the latents of samples 0 to count - 1 of a seed."""
        for at in range(0, count, batch):
            size = min(batch, count - at)
            latents = self.model.predict_on_batch(draw(seed, at, size, self.model.input_shape[-1]))
            if self.gamma:
                # Half of all seeds away: a user who also samples a seed nearby does not get this noise again.
                noise = draw((seed + SEEDS // 2) % SEEDS, at, size, latents.shape[1])
                latents = latents + noise * self._deviation
            if normalisation is not None:
                latents = latents * normalisation.scale + normalisation.shift
            yield latents

    @cached_property
    def _deviation(self) -> Float32Array:
        """Gamma in units of the latents. With a deterministic first stage, the second stage saw them standardised."""
        if self.run.recipe.first_stage == "vae":
            return np.array([self.gamma], np.float32)
        return np.array(self.gamma * np.sqrt(self.run.diagnostics["aggregate_variance"]), np.float32)

    @cached_property
    def _many(self) -> Float32Array:
        return np.concatenate(list(self.latents(0, DRAWS, 1000)))

    def normalisation(self, mode: str) -> Normalisation | None:
        """Return the constants that an exported bundle would have: fitted on DRAWS samples of seed 0."""
        if mode == "none":
            return None
        known = self.run.diagnostics
        return fit(mode, self._many, known["aggregate_mean"], known["aggregate_variance"])


def _last_gamma(run: Run) -> float:
    gammas = [record["gamma"] for record in run.history() if record["stage"] == 2 and "gamma" in record]
    if not gammas:
        raise RunError(f"--latent-noise takes gamma from the second stage's history, and {run.path} has none")
    return float(gammas[-1])
