"""Training speed of stage 1: images a second on random pictures, settings one after the other.

Beside it the rate at which the input pipeline alone delivers them, to a network that does nothing.

python benchmarks/train.py --recipe faces --try base_dim=16 --try base_dim=24,batch=100,precision=mixed_bfloat16
"""

from __future__ import annotations

import time
from typing import Any

import click
import numpy as np

from training.data.dataset import Dataset
from training.data.splits import Report
from training.fit.batches import Epoch
from training.model.autoencoder import xla  # before Keras: it chooses the backend's settings
from training.model.build import image_autoencoder
from training.recipe import Recipe
from training.recipes import recipe
from training.record.stage import first_schedule

import keras  # isort: skip


@click.command()
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=50, show_default=True, help="Minibatches timed, after one pass of as many.")
@click.option("--steps-per-execution", default=1, show_default=True)
def main(name: str, trials: tuple[str, ...], steps: int, steps_per_execution: int) -> None:
    """Time the training step, and the input pipeline without it."""
    print(f"{keras.backend.backend()}: images/s of stage 1, recipe {name}")
    for trial in trials:
        wanted = recipe(name).set(part for part in trial.split(",") if part)
        shape = (wanted.batch * steps, wanted.side, wanted.side, wanted.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data = Dataset(images, wanted.flip, Report())
        model = image_autoencoder(wanted)
        trained = rate(model, data, wanted, steps_per_execution)
        piped = rate(null(), data, wanted, steps_per_execution)
        weights = model.encoder.count_params() / 1e6, model.decoder.count_params() / 1e6
        print(
            f"{trial or 'as it is':50} {trained:9.1f} images/s; pipeline alone {piped:,.0f}, "
            f"{piped / trained:.0f} times that; encoder {weights[0]:.1f} M, decoder {weights[1]:.1f} M weights",
            flush=True,
        )


def null() -> keras.Model:
    """Return a network that takes pictures and learns one number."""

    class Null(keras.Model):  # type: ignore[misc]  # Keras ships no types
        def __init__(self) -> None:
            super().__init__()
            self.only = keras.layers.Dense(1)

        def call(self, images: Any) -> Any:
            return self.only(keras.ops.cast(images[:, 0, 0, :1], "float32"))

        def compute_loss(
            self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            return keras.ops.mean(y_pred)

    return Null()


def rate(model: keras.Model, data: Dataset, wanted: Recipe, steps_per_execution: int) -> float:
    """Return the images a second of the second of two passes."""
    optimizer = keras.optimizers.Adam(wanted.lr)
    model.compile(optimizer=optimizer, jit_compile=xla(), steps_per_execution=steps_per_execution)
    seconds = 0.0
    for epoch in (0, 1):
        began = time.perf_counter()
        model.fit(Epoch(first_schedule(wanted, len(data)), data.batch, epoch), shuffle=False, verbose=0)
        seconds = time.perf_counter() - began
    return len(data) / seconds


if __name__ == "__main__":
    main()
