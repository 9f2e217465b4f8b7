"""The method, station by station: stage 1 on pictures, posteriors, and the priors fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from training.data.dataset import Dataset, Splits
from training.errors import DataError
from training.fit import devices
from training.fit.stage import Execution, Schedule, Watcher, latent_summary, posteriors, train
from training.fit.stop import StopRequest
from training.model import networks, priors
from training.model.autoencoder import RAE, VAE, Autoencoder
from training.model.balance import policy
from training.recipe import Recipe
from training.record import grids as figures
from training.record.files import write_json
from training.record.run import Record, Run, save_model

GRID = 64  # samples in a grid
PEAK = 255.0  # the value of a uint8 image that stands for 1


def image_autoencoder(recipe: Recipe, steps: int = 1) -> Autoencoder:
    """Return stage 1 over uint8 images, variational or deterministic; `steps` is the minibatches an epoch."""
    kind, _, regulariser = recipe.first_stage.partition("-")
    encoder, decoder = networks.image_encoder(recipe), networks.image_decoder(recipe, spectral=regulariser == "sn")
    options = {"peak": PEAK, "seed": recipe.seed, "dtype": recipe.precision}
    if kind == "vae":
        return VAE(encoder, decoder, policy(recipe, 1, steps), kl_weight=recipe.k, **options)
    embedding = recipe.embedding if kind == "rae" else 0.0
    return RAE(encoder, decoder, embedding, regulariser, recipe.regularisation, **options)


def latent_vae(recipe: Recipe, steps: int = 1) -> VAE:
    """Return stage 2: a VAE over stage 1's latents."""
    balance = policy(recipe, 2, steps)
    return VAE(networks.latent_encoder(recipe), networks.latent_decoder(recipe), balance, seed=recipe.seed)


Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Posteriors:
    """Stage 1's posterior of every training picture; drawn from anew whenever it is read.

    Attributes:
        mean: float32 [count, latent_dim].
        sd: float32 [count, latent_dim]; 0 where stage 1 is deterministic.
    """

    mean: Floats
    sd: Floats

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return one draw from each posterior at `indices`."""
        mean = self.mean[indices]
        return mean + self.sd[indices] * rng.standard_normal(mean.shape, np.float32)

    def standardised(self) -> tuple[Posteriors, Floats, Floats]:
        """Return the latents as a second stage sees them, and the centre and spread that takes them back.

        A VAE's latents are of unit scale by its KL divergence, and are taken as they are, as in the paper. A
        deterministic encoder's have the scale that it happened to find.
        """
        if self.sd.any():
            size = self.mean.shape[1]
            return self, np.zeros(size, np.float32), np.ones(size, np.float32)
        centre, spread = self.mean.mean(axis=0), np.maximum(self.mean.std(axis=0), np.float32(1e-6))
        return Posteriors((self.mean - centre) / spread, self.sd), centre, spread

    def diagnostics(self) -> Record:
        """Return what the aggregate posterior looks like; latent normalisation is fitted to it.

        Its mean is the posteriors' mean, its variance Var[mean] + mean[sd^2], latent by latent.
        """
        mean, sd = self.mean.astype(np.float64), self.sd.astype(np.float64)
        inside = np.mean(np.square(sd), axis=0)
        return {
            **latent_summary(self.mean, self.sd),
            "definition": "active: mean posterior variance below 0.8",
            "posterior_variance": inside.tolist(),
            "aggregate_mean": mean.mean(axis=0).tolist(),
            "aggregate_variance": (mean.var(axis=0) + inside).tolist(),
        }


def encode(encoder: keras.Model, dataset: Dataset) -> Posteriors:
    """Return the posteriors of all pictures, and of their mirror images where those belong to the data."""
    count = len(dataset)
    parts = []
    for mirrored in (False, True) if dataset.flip else (False,):
        for at in range(0, count, 5000):
            pictures = dataset.rows(np.arange(at, min(at + 5000, count)))
            parts.append(posteriors(encoder, pictures[:, :, ::-1] if mirrored else pictures, PEAK))
    means, sds = zip(*parts, strict=True)
    return Posteriors(np.concatenate(means), np.concatenate(sds))


class _Album:
    """Pass news on, and keep what stage 1 looks like every few epochs: grids from the same noise, and snapshots."""

    def __init__(self, model: Autoencoder, recipe: Recipe, run: Run, watcher: Watcher) -> None:
        self.model, self.recipe, self.run, self.watcher = model, recipe, run, watcher

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        self.watcher.step(schedule, epoch, images, logs)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        done, recipe = record["epoch"] + 1, self.recipe
        if done % recipe.sample_every == 0 or done == schedule.epochs:
            pictures = self.model.decoder(grid_noise(recipe, recipe.latent_dim), training=False)
            figures.grid(self.run.path / "samples" / f"stage1-{done:04d}.png", figures.to_uint8(pictures))
        if recipe.snapshot_every and done % recipe.snapshot_every == 0:
            save_model(self.run.snapshot_path(done), _plain_images(self.model, recipe))
        self.watcher.epoch(schedule, record)


def grid_noise(recipe: Recipe, size: int) -> Floats:
    """Return the noise of every grid of a run, so that grids can be compared."""
    return np.random.default_rng(recipe.seed).standard_normal((GRID, size), np.float32)


def train_two_stages(
    recipe: Recipe,
    splits: Splits,
    run: Run,
    watcher: Watcher,
    stop: StopRequest,
    execution: Execution,
) -> None:
    """Train stage 1 and fit its priors into a run directory, going on where an earlier call was stopped.

    Raises:
        DataError: too few pictures for what the recipe asks.
        Stopped: a signal came, in training or after it; everything is saved.
        Diverged: a number stopped being one.
        RunError: the run directory's state does not fit.
    """
    pictures = splits.train
    if "gmm" in recipe.priors and len(pictures) < recipe.gmm_components:
        raise DataError(
            f"a mixture of {recipe.gmm_components} takes as many pictures. Received: {len(pictures)}; "
            "set gmm_components"
        )
    if not run.network_path(1).exists():
        schedule = Schedule(1, len(pictures), recipe.epochs, recipe.batch, recipe.lr, recipe.halve_every, recipe.seed)
        with devices.spread(execution.devices, schedule.size):
            model = image_autoencoder(recipe, schedule.steps)
            album = _Album(model, recipe, run, watcher)
            train(model, pictures, schedule, run, album, stop, execution, splits.validation)
        run.finish(1, _plain_images(model, recipe))
    if not devices.first():
        return  # what follows is too small to share out
    first = run.load_networks(1)
    latents = encode(first.get_layer("encoder"), pictures)
    write_json(run.path / "diagnostics.json", latents.diagnostics())

    for name in recipe.priors:
        if name in priors.available(run):
            continue
        if name == "second-stage":
            _train_second_stage(recipe, latents, run, watcher, stop, execution)
        else:
            draws = latents.batch(np.arange(len(latents)), np.random.default_rng(recipe.seed))
            save_model(run.prior_path(name), priors.fit(name, draws, recipe.gmm_components, recipe.seed))
    for name in priors.available(run):
        prior = priors.load(run, name)
        drawn = first.get_layer("decoder")(prior(grid_noise(recipe, prior.input_shape[-1])), training=False)
        figures.grid(run.path / "samples" / f"{name}.png", figures.to_uint8(drawn))
    figures.draw(run, first, splits)


def _train_second_stage(
    recipe: Recipe, latents: Posteriors, run: Run, watcher: Watcher, stop: StopRequest, execution: Execution
) -> None:
    seen, centre, spread = latents.standardised()
    schedule = Schedule(2, len(seen), recipe.epochs2, recipe.batch, recipe.lr2, recipe.halve_every2, recipe.seed)
    vae = latent_vae(recipe, schedule.steps)
    train(vae, seen, schedule, run, watcher, stop, execution)
    in_units_of(vae, centre, spread)
    run.finish(2, plain(vae.encoder, vae.decoder))


def in_units_of(vae: VAE, centre: Floats, spread: Floats) -> None:
    """Change a second stage over (z - centre) / spread into one over z, in its dense layers' weights."""
    size = len(centre)
    for name in ("dense_0", "mean", "log_sd"):
        layer = vae.encoder.get_layer(name)
        kernel, bias = layer.get_weights()
        scaled = kernel[:size] / spread[:, None]  # beside z, the heads see what the dense layers made of it
        layer.set_weights([np.concatenate([scaled, kernel[size:]]), bias - centre @ scaled])
    layer = vae.decoder.get_layer("latents")
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel * spread, bias * spread + centre])


def _plain_images(model: Autoencoder, recipe: Recipe) -> keras.Model:
    """Return stage 1's networks as they are kept: float32, and without what spectral normalisation needs."""
    like = image_autoencoder(replace(recipe, precision="float32", first_stage=_UNWRAPPED[type(model)]))
    for ours, theirs in ((like.encoder, model.encoder), (like.decoder, model.decoder)):
        for layer in ours.layers:
            trained = theirs.get_layer(layer.name)
            layer.set_weights(getattr(trained, "layer", trained).get_weights())
    return plain(like.encoder, like.decoder)


_UNWRAPPED: dict[type[Autoencoder], str] = {VAE: "vae", RAE: "ae"}


def plain(encoder: keras.Model, decoder: keras.Model) -> keras.Model:
    """Return networks as one model of stock Keras layers: x -> [decoded mean, what the encoder gives ...]."""
    x = keras.Input(encoder.input_shape[1:], name="x")
    statistics = encoder(x)
    statistics = list(statistics) if isinstance(statistics, list | tuple) else [statistics]
    return keras.Model(x, [decoder(statistics[0]), *statistics], name="autoencoder")
