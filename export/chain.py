"""The chain: second-stage decoder, latent normalisation, first-stage decoder, pixels - one Keras model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from serve.noise import draw
from training.errors import RunError
from training.model.normalise import DRAWS, EVIDENT, Normalisation, fit, variance_loss
from training.record.run import Run
from training.types import Float32Array


class Affine(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """z * scale + shift with constants that are weights: tf2onnx makes a graph input of any other tensor."""

    def __init__(self, normalisation: Normalisation, **options: Any) -> None:
        super().__init__(trainable=False, **options)
        self.normalisation = normalisation

    def build(self, shape: Any) -> None:
        """Create the constants."""
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")
        self.shift = self.add_weight(name="shift", shape=(shape[-1],), initializer="zeros")
        self.scale.assign(self.normalisation.scale)
        self.shift.assign(self.normalisation.shift)

    def call(self, latents: Any) -> Any:
        """Return the normalised latents."""
        return latents * self.scale + self.shift


class ToUint8(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
    """[0, 1] -> uint8, rounded to the nearest grey level."""

    def call(self, images: Any) -> Any:
        """Return the images as uint8."""
        return ops.cast(ops.round(images * 255.0), "uint8")

    def compute_output_spec(self, images: Any) -> Any:
        """Return the shape unchanged, as uint8."""
        return keras.KerasTensor(images.shape, dtype="uint8")


def build(
    run: Run, prior: str, mode: str, draws: int = DRAWS, with_latents: bool = False, plain: bool = False
) -> tuple[keras.Model, Normalisation]:
    """Return noise [n, noise_size] -> images uint8 [n, side, side, channels], and its normalisation.

    Args:
        run: A finished run.
        prior: One of the run's priors (`Run.priors`).
        mode: Latent normalisation, of second-stage samples only: the others have the variance they were fitted to.
            One of MODES, or "guarded": "scalar" where the samples evidently lack variance, else "none".
        draws: Samples to fit it on.
        with_latents: Whether the latents [n, latent_dim] that the first stage decodes come out as well.
        plain: Whether to take the first stage's own decoder where there is a sharpened one.

    Raises:
        RunError: the run is not finished, has no such prior, or lacks the history that "guarded" goes by.
    """
    decoder = run.decoder(plain)
    source = run.prior(prior)
    noise = keras.Input(source.input_shape[1:], name="noise")
    latents = source(noise)
    size = int(latents.shape[-1])
    normalisation = Normalisation("none", np.ones(size, np.float32), np.zeros(size, np.float32), 0)
    if prior == "second-stage" and mode != "none":
        source.jit_compile = False  # XLA is slower on a CPU
        generated = source.predict(draw(0, 0, draws, int(noise.shape[-1])), batch_size=1000, verbose=0)
        known = run.diagnostics
        if mode == "guarded":
            mode = "scalar" if _lost(run, generated) > EVIDENT else "none"
        if mode != "none":
            normalisation = fit(mode, generated, known["aggregate_mean"], known["aggregate_variance"])
            latents = Affine(normalisation, name="normalise")(latents)
    source.name, decoder.name = "stage2" if prior == "second-stage" else prior, "stage1"
    images = ToUint8(name="pixels")(decoder(latents))
    return keras.Model(noise, [images, latents] if with_latents else images, name="chain"), normalisation


def _lost(run: Run, generated: Float32Array) -> float:
    errors = [record["mse"] for record in run.history() if record["stage"] == 2]
    if not errors:
        raise RunError(f"--normalise guarded goes by the second stage's error, and {run.path} has no history of it")
    return variance_loss(generated, run.diagnostics, errors[-1], standardised=run.recipe.first_stage != "vae")
