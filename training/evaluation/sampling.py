"""Where pictures come from: reconstructions and samples of a run's first stage, samples of a bundle.

Noise is the noise contract's (docs/noise.md), so that a run and the bundle made of it are measured on the same
samples. Everything comes in batches.
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
    """A first stage's encoder and decoder, at work on batches."""

    def __init__(self, networks: keras.Model) -> None:
        self.encoder, self.decoder = networks.get_layer("encoder"), networks.get_layer("decoder")
        self.encoder.jit_compile = self.decoder.jit_compile = xla()

    def reconstruct(self, batches: Iterable[UInt8Array], tally: Tally) -> Iterator[UInt8Array]:
        """Yield each picture decoded from its posterior's mean; the tally sees posteriors and errors."""
        for images in batches:
            pictures = images.astype(np.float32) / np.float32(IMAGE_SCALE)
            mean, *log_sd = keras.tree.flatten(self.encoder.predict_on_batch(pictures))
            decoded = self.decoder.predict_on_batch(mean)
            tally.add(mean, np.exp(log_sd[0]) if log_sd else None, pictures, decoded)
            yield to_uint8(decoded)

    def decode(self, batches: Iterable[Float32Array]) -> Iterator[UInt8Array]:
        """Yield the pictures of latents."""
        for latents in batches:
            yield to_uint8(self.decoder.predict_on_batch(latents))


class LatentSampler:
    """Latents from one of a run's priors.

    Args:
        run: A finished run.
        name: Of the prior.
        noisy: Whether a second stage's samples get the noise of its own likelihood, as Dai & Wipf's do.

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
        """Yield the latents of samples 0 ... count - 1 of a seed."""
        for at in range(0, count, batch):
            size = min(batch, count - at)
            latents = self.model.predict_on_batch(draw(seed, at, size, self.model.input_shape[-1]))
            if self.gamma:
                # Half the seeds away: no user's neighbouring seed draws the same.
                noise = draw((seed + SEEDS // 2) % SEEDS, at, size, latents.shape[1])
                latents = latents + noise * self._deviation
            if normalisation is not None:
                latents = latents * normalisation.scale + normalisation.shift
            yield latents

    @cached_property
    def _deviation(self) -> Float32Array:
        """Gamma in the latents' own units: a second stage over a deterministic first one saw them standardised."""
        if self.run.recipe.first_stage == "vae":
            return np.array([self.gamma], np.float32)
        return np.array(self.gamma * np.sqrt(self.run.diagnostics["aggregate_variance"]), np.float32)

    @cached_property
    def _many(self) -> Float32Array:
        return np.concatenate(list(self.latents(0, DRAWS, 1000)))

    def normalisation(self, mode: str) -> Normalisation | None:
        """Return the constants as an exported bundle has them: fitted on DRAWS samples of seed 0."""
        if mode == "none":
            return None
        known = self.run.diagnostics
        return fit(mode, self._many, known["aggregate_mean"], known["aggregate_variance"])


def _last_gamma(run: Run) -> float:
    gammas = [record["gamma"] for record in run.history() if record["stage"] == 2 and "gamma" in record]
    if not gammas:
        raise RunError(f"--latent-noise takes gamma from the second stage's history, and {run.path} has none")
    return float(gammas[-1])
