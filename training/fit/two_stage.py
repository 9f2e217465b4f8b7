"""The whole method: train stage 1 on pictures, take their posteriors, fit priors to those, sharpen its decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.data.dataset import Dataset, Splits, load_data
from training.errors import DataError
from training.files import write_json
from training.fit import devices
from training.fit.execution import Execution
from training.fit.stage import train_stage
from training.fit.stop import StopRequest
from training.fit.warm import fingerprint, warm_start
from training.model import priors
from training.model.autoencoder import Autoencoder
from training.model.build import (
    IMAGE_SCALE,
    image_autoencoder,
    image_decoder,
    in_units_of,
    latent_vae,
    plain,
    plain_images,
    sharpener,
)
from training.model.latents import Posteriors, infer, posteriors, squared_error
from training.model.normalise import DRAWS, Normalisation, fit
from training.recipe import Recipe
from training.record import grids
from training.record.advice import Adviser
from training.record.models import save_model
from training.record.run import Run
from training.record.stage import Observer, Observers, Schedule, first_schedule, second_schedule, third_schedule
from training.record.tensorboard import TensorBoardWriter
from training.types import Float32Array, Record, UInt8Array

GRID = 64  # samples in a grid
SAMPLES = 512  # samples whose variance is compared with the pictures'
MEASURED = 1000  # pictures that it is compared with


def encode(encoder: keras.Model, dataset: Dataset, stop: StopRequest) -> Posteriors:
    """Return the posteriors of all pictures, and of their mirror images where those belong to the data.

    Raises:
        Stopped: `stop` had a signal.
    """
    count, parts = len(dataset), []
    for mirrored in (False, True) if dataset.flip else (False,):
        for at in range(0, count, 1000):
            stop.check()
            pictures = dataset.rows(np.arange(at, min(at + 1000, count)))
            parts.append(posteriors(encoder, pictures[:, :, ::-1] if mirrored else pictures, IMAGE_SCALE))
    means, sds = zip(*parts, strict=True)
    return Posteriors(np.concatenate(means), np.concatenate(sds))


class _Album:
    """Keep grids of samples, all from the same latents, and snapshots every few epochs; then tell an observer."""

    def __init__(self, model: Autoencoder, recipe: Recipe, run: Run, observer: Observer, latents: Float32Array) -> None:
        self.model, self.recipe, self.run, self.observer = model, recipe, run, observer
        self.latents = latents

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        self.observer.step(schedule, epoch, images, logs)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        done, recipe = record["epoch"], self.recipe
        if done % recipe.sample_every == 0 or done == schedule.epochs:
            pictures = self.model.decoder(self.latents, training=False)
            path = self.run.path / "samples" / f"stage{schedule.stage}-{done:04d}.png"
            grids.grid(path, grids.to_uint8(pictures))
        if schedule.stage == 1 and recipe.snapshot_every and done % recipe.snapshot_every == 0:
            save_model(self.run.snapshot_path(done), plain_images(self.model, recipe))
        self.observer.epoch(schedule, record)

    def note(self, text: str) -> None:
        self.observer.note(text)


def noise(recipe: Recipe, size: int, count: int) -> Float32Array:
    """Return the noise that every grid of a run is decoded from, so that grids can be compared."""
    return np.random.default_rng(recipe.seed).standard_normal((count, size), np.float32)


def train(
    recipe: Recipe,
    data: Path | Splits,
    out: Path,
    *,
    start: Path | None = None,
    observer: Observer | None = None,
    stop: StopRequest | None = None,
    execution: Execution = Execution(),  # noqa: B008  # frozen
) -> Run:
    """Train a recipe on pictures into a run directory, going on where an earlier call was stopped.

    Args:
        recipe: What to train, as in RECIPES["faces"]().
        data: Where the pictures are, or what `load_data` made of them with this recipe.
        out: The run directory: a new folder, or that of the same recipe and pictures.
        start: A finished run whose stage 1 training starts from, where its weights fit; None starts from noise.
        observer: Is told of every minibatch and epoch, to show progress for example.
        stop: Ends training, with everything saved, once its `signal` is set.
        execution: How often to save, and what to run on.

    Raises:
        TrainingError: DataError, RunError, WriteError or Diverged, each of which says what to do.
        Stopped: `stop` had a signal.
    """
    splits = data if isinstance(data, Splits) else load_data(data, recipe)
    identity = {"count": len(splits.train), "digest": splits.train.digest}
    with devices.run_directory(out) as folder:
        run = Run(folder)
        digest = fingerprint(start) if start else ""
        with run.open(recipe, identity, digest) as recipe, TensorBoardWriter(run) as events:
            both = Observers(Adviser(run, observer), events) if observer else events
            train_two_stages(recipe, splits, run, both, stop or StopRequest(), execution, start)
    return Run(out)


def train_two_stages(
    recipe: Recipe,
    splits: Splits,
    run: Run,
    observer: Observer,
    stop: StopRequest,
    execution: Execution,
    start: Path | None = None,
) -> None:
    """Train stage 1, fit its priors and sharpen its decoder, going on where an earlier call was stopped.

    Raises:
        DataError: there are too few pictures for the recipe.
        Stopped: a signal came, in training or after it; everything is saved.
        Diverged: a loss term or weight became NaN or infinite.
        RunError: the saved state belongs to other networks, or is damaged.
    """
    pictures = splits.train
    if "gmm" in recipe.priors and len(pictures) < recipe.gmm_components:
        raise DataError(
            f"a mixture of {recipe.gmm_components} takes as many pictures. Received: {len(pictures)}; "
            "set gmm_components"
        )
    if not run.network_path(1).exists():
        schedule = first_schedule(recipe, len(pictures))
        with devices.strategy_scope(execution.devices, schedule.size):
            model = image_autoencoder(recipe, schedule.steps)
            if start and run.saved_position(1) is None:
                observer.note(warm_start(model, start))
            album = _Album(model, recipe, run, observer, noise(recipe, recipe.latent_dim, GRID))
            train_stage(model, pictures, schedule, run, album, stop, execution, splits.validation)
        run.finish(1, plain_images(model, recipe))
    if not devices.is_chief():
        return  # what follows is too small to share out
    first = run.load_networks(1)
    latents = encode(first.get_layer("encoder"), pictures, stop)
    facts = {**latents.diagnostics(), **_against_data(first, pictures), "diversity": {}}
    write_json(run.path / "diagnostics.json", facts)

    for name in recipe.priors:
        stop.check()
        if name in run.priors:
            continue
        if name == "second-stage":
            _train_second_stage(recipe, latents, run, observer, stop, execution)
        else:
            draws = latents.batch(np.arange(len(latents)), np.random.default_rng(recipe.seed))
            save_model(run.prior_path(name), priors.fit(name, draws, recipe.gmm_components, recipe.seed))
    for name in run.priors:
        stop.check()
        prior = run.prior(name)
        (drawn,) = infer(first.get_layer("decoder"), infer(prior, noise(recipe, prior.input_shape[-1], SAMPLES))[0])
        facts["diversity"][name] = variance(drawn) / facts["pixel_variance"]
        grids.grid(run.path / "samples" / f"{name}.png", grids.to_uint8(drawn[:GRID]))
    write_json(run.path / "diagnostics.json", facts)
    if recipe.epochs3:
        samples = Samples(recipe, run, facts)
        if not run.sharpened:
            _sharpen(recipe, splits, first, samples, run, observer, stop, execution)
        decoder = run.decoder()
        (drawn,) = infer(decoder, samples(SAMPLES))
        grids.grid(run.path / "samples" / "sharpened.png", grids.to_uint8(drawn[:GRID]))
        error = _against_data(first, pictures, decoder)["error"]
        facts["sharpened"] = {"error": error, "diversity": variance(drawn) / facts["pixel_variance"]}
        write_json(run.path / "diagnostics.json", facts)
    stop.check()
    grids.draw(run, first, splits)


def _against_data(networks: keras.Model, pictures: Dataset, decoder: keras.Model | None = None) -> Record:
    """Return the pictures' variance, and the reconstructions' error in units of it: 1 for the average picture.

    They are decoded by the networks' own decoder, or by another.
    """
    count = len(pictures)
    some = pictures.rows(np.linspace(0, count - 1, min(count, MEASURED)).astype(np.intp))
    spread = max(variance(some) / IMAGE_SCALE**2, 1e-9)
    decoded, latents = infer(networks, some, IMAGE_SCALE)[:2]
    if decoder:
        (decoded,) = infer(decoder, latents)
    return {"pixel_variance": spread, "error": squared_error(some, IMAGE_SCALE, decoded) / spread}


def variance(pictures: Float32Array | UInt8Array) -> float:
    """Return the variance of pictures [n, ...] about the average picture, averaged over its values."""
    rows = pictures.swapaxes(0, 1)  # one row of all pictures at a time, as float64 takes eight times the bytes
    return float(np.mean([np.var(row, axis=0, dtype=np.float64) for row in rows]))


def _sharpen(
    recipe: Recipe,
    splits: Splits,
    first: keras.Model,
    samples: Samples,
    run: Run,
    observer: Observer,
    stop: StopRequest,
    execution: Execution,
) -> None:
    known = run.diagnostics
    error = known["error"] * known["pixel_variance"]
    model = sharpener(recipe, first, samples.prior, samples.normalisation, error)
    album = _Album(model, recipe, run, observer, samples(GRID))
    schedule = third_schedule(recipe, len(splits.train))
    train_stage(model, splits.train, schedule, run, album, stop, execution, splits.validation)
    decoder = image_decoder(recipe)
    model.keep(decoder)
    save_model(run.network_path(3), decoder)


class Samples:
    """Latents of a run's default prior, with the latents' variance, as in an exported chain.

    Args:
        recipe: The run's.
        run: With its priors.
        known: Its diagnostics.
    """

    def __init__(self, recipe: Recipe, run: Run, known: Record) -> None:
        self.recipe, self.prior = recipe, run.prior(run.default_prior)
        size = recipe.latent_dim
        self.normalisation = Normalisation("none", np.ones(size, np.float32), np.zeros(size, np.float32), 0)
        if run.default_prior == "second-stage":
            (latents,) = infer(self.prior, noise(recipe, size, DRAWS))
            self.normalisation = fit("scalar", latents, known["aggregate_mean"], known["aggregate_variance"])

    def __call__(self, count: int) -> Float32Array:
        """Return latents [count, latent_dim], the same each time."""
        (latents,) = infer(self.prior, noise(self.recipe, self.prior.input_shape[-1], count))
        return latents * self.normalisation.scale + self.normalisation.shift


def _train_second_stage(
    recipe: Recipe, latents: Posteriors, run: Run, observer: Observer, stop: StopRequest, execution: Execution
) -> None:
    seen, centre, spread = latents.standardised()
    schedule = second_schedule(recipe, len(seen))
    vae = latent_vae(recipe, schedule.steps)
    train_stage(vae, seen, schedule, run, observer, stop, execution)
    in_units_of(vae, centre, spread)
    run.finish(2, plain(vae.encoder, vae.decoder))
