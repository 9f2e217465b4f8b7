"""The method, station by station: stage 1 on pictures, posteriors, stage 2 on latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from training import figures, networks
from training.balance import ComputedBalance
from training.dataset import Dataset
from training.recipes import Recipe
from training.run import Record, Run, write_json
from training.stage import Schedule, StopRequest, Watcher, latent_summary, posteriors, train
from training.vae import VAE, xla

GRID = 64  # samples in a grid
PEAK = 255.0  # the value of a uint8 image that stands for 1


def image_vae(recipe: Recipe) -> VAE:
    """Return stage 1: a VAE over uint8 images."""
    keras.utils.set_random_seed(recipe.seed)
    keras.config.set_dtype_policy(recipe.precision)
    return VAE(
        networks.image_encoder(recipe),
        networks.image_decoder(recipe),
        ComputedBalance(),
        kl_weight=recipe.kl_weight,
        peak=PEAK,
        seed=recipe.seed,
    )


def latent_vae(recipe: Recipe) -> VAE:
    """Return stage 2: a VAE over stage 1's latents. It is small: float32 whatever stage 1 computes in."""
    keras.utils.set_random_seed(recipe.seed + 1)
    keras.config.set_dtype_policy("float32")
    return VAE(networks.latent_encoder(recipe), networks.latent_decoder(recipe), ComputedBalance(), seed=recipe.seed)


@dataclass(frozen=True)
class Posteriors:
    """Stage 1's posterior of every training picture; drawn from anew whenever it is read.

    Attributes:
        mean: float32 [count, latent_dim].
        sd: float32 [count, latent_dim].
    """

    mean: npt.NDArray[np.float32]
    sd: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return one draw from each posterior at `indices`."""
        mean = self.mean[indices]
        return mean + self.sd[indices] * rng.standard_normal(mean.shape, np.float32)

    def diagnostics(self) -> Record:
        """Return what the aggregate posterior looks like; latent normalisation is fitted to it.

        Its mean is the posteriors' mean, its variance Var[mean] + mean[sd^2], latent by latent.
        """
        mean, sd = self.mean.astype(np.float64), self.sd.astype(np.float64)
        inside = np.mean(np.square(sd), axis=0)
        return {
            **latent_summary(self.mean, self.sd),
            "active_means": "mean posterior variance below 0.8",
            "posterior_variance": inside.tolist(),
            "aggregate_mean": mean.mean(axis=0).tolist(),
            "aggregate_variance": (mean.var(axis=0) + inside).tolist(),
        }


def encode(encoder: keras.Model, dataset: Dataset) -> Posteriors:
    """Return the posteriors of all pictures, and of their mirror images where those belong to the data."""
    encoder.jit_compile = xla()
    views = [dataset.images] + ([dataset.images[:, :, ::-1]] if dataset.flip else [])
    parts = [posteriors(encoder, view[at : at + 5000], PEAK) for view in views for at in range(0, len(view), 5000)]
    means, sds = zip(*parts, strict=True)
    return Posteriors(np.concatenate(means), np.concatenate(sds))


class _Sampler:
    """Pass news on, and draw a grid of stage 1's samples every few epochs: always from the same noise."""

    def __init__(self, vae: VAE, recipe: Recipe, run: Run, watcher: Watcher) -> None:
        self.vae, self.recipe, self.run, self.watcher = vae, recipe, run, watcher

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        self.watcher.step(schedule, epoch, images, logs)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        done = record["epoch"] + 1
        if done % self.recipe.sample_every == 0 or done == schedule.epochs:
            pictures = self.vae.decoder(grid_noise(self.recipe), training=False)
            figures.grid(self.run.path / "samples" / f"stage1-{done:04d}.png", to_uint8(pictures))
        self.watcher.epoch(schedule, record)


def grid_noise(recipe: Recipe) -> npt.NDArray[np.float32]:
    """Return the noise of every grid of a run, so that grids can be compared."""
    return np.random.default_rng(recipe.seed).standard_normal((GRID, recipe.latent_dim), np.float32)


def to_uint8(images: Any) -> npt.NDArray[np.uint8]:
    """Return images in [0, 1] as uint8, rounded."""
    return np.asarray(ops.convert_to_numpy(ops.round(images * 255))).astype(np.uint8)


def train_two_stages(recipe: Recipe, dataset: Dataset, run: Run, watcher: Watcher, stop: StopRequest) -> None:
    """Train both stages into a run directory, going on where an earlier call was stopped.

    Raises:
        Stopped: a signal came; everything is saved.
        RunError: the run directory's state does not fit.
    """
    if not run.has_networks(1):
        vae = image_vae(recipe)
        schedule = Schedule(1, len(dataset), recipe.epochs, recipe.batch, recipe.lr, recipe.halve_every, recipe.seed)
        train(vae, dataset, schedule, run, _Sampler(vae, recipe, run, watcher), stop)
        run.save_networks(1, plain(vae, image_vae(replace(recipe, precision="float32"))))
    first = run.load_networks(1)
    latents = encode(first.get_layer("encoder"), dataset)
    write_json(run.path / "diagnostics.json", latents.diagnostics())

    if recipe.epochs2 and not run.has_networks(2):
        vae = latent_vae(recipe)
        schedule = Schedule(2, len(latents), recipe.epochs2, recipe.batch, recipe.lr2, recipe.halve_every2, recipe.seed)
        train(vae, latents, schedule, run, watcher, stop)
        run.save_networks(2, plain(vae, vae))
    if recipe.epochs2:
        second = run.load_networks(2).get_layer("decoder")
        pictures = first.get_layer("decoder")(second(grid_noise(recipe), training=False), training=False)
        figures.grid(run.path / "samples" / "stage2.png", to_uint8(pictures))
    figures.history(run.path / "figures" / "history.png", run.history())


def plain(trained: VAE, like: VAE) -> keras.Model:
    """Return a trained VAE's networks as one model of stock Keras layers: x -> [decoded mean, mean, log_sd].

    `like` has the same networks and gives their precision: what is kept computes in float32.
    """
    if like is not trained:
        like.encoder.set_weights(trained.encoder.get_weights())
        like.decoder.set_weights(trained.decoder.get_weights())
    x = keras.Input(like.encoder.input_shape[1:], name="x")
    mean, log_sd = like.encoder(x)
    return keras.Model(x, [like.decoder(mean), mean, log_sd], name="vae")
