"""Training speed of stage 1 on random pictures, and the rate at which the input pipeline alone delivers them.

The pipeline is timed by a network that does nothing.

python benchmarks/train.py --recipe faces --try base_dim=16 --try base_dim=24,batch=100,precision=mixed_bfloat16
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import Row, Table, finish, interleave, json_option, speed

from training import RECIPES, Recipe

# Not of the public interface, which trains whole runs: a step is timed here without what a run keeps and shows.
from training.data.dataset import Dataset
from training.data.splits import Report
from training.fit.batches import Epoch
from training.model.autoencoder import xla  # before Keras: it chooses the backend's settings
from training.model.build import image_autoencoder
from training.record.stage import first_schedule

import keras  # isort: skip


@click.command()
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=50, show_default=True, help="Minibatches a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps-per-execution", default=1, show_default=True)
@json_option
def main(
    name: str, trials: tuple[str, ...], steps: int, rounds: int, steps_per_execution: int, report: Path | None
) -> None:
    """Time the training step, and the input pipeline without it."""
    measured: dict[str, Callable[[], float]] = {}
    for trial in trials:
        wanted = RECIPES[name]().set(part for part in trial.split(",") if part)
        shape = (wanted.batch * steps, wanted.side, wanted.side, wanted.channels)
        data = Dataset(np.random.default_rng(0).integers(0, 256, shape, np.uint8), wanted.flip, Report())
        model = image_autoencoder(wanted)
        weights = model.encoder.count_params() / 1e6, model.decoder.count_params() / 1e6
        title = f"{trial or 'as it is'} (encoder {weights[0]:.1f} M, decoder {weights[1]:.1f} M weights)"
        measured[title] = trainer(model, data, wanted, steps_per_execution)
        measured[f"{trial or 'as it is'}, the pipeline alone"] = trainer(null(), data, wanted, steps_per_execution)
    found = interleave(measured, rounds)
    rows = [Row(each, "images/s", values) for each, values in found.items()]
    table = Table(f"Stage 1 by {keras.backend.backend()}, recipe {name}, steps a round: {steps}", rows, [rows[0].name])
    table.show()
    finish(report, __doc__, [table])


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


def trainer(model: keras.Model, data: Dataset, wanted: Recipe, steps_per_execution: int) -> Callable[[], float]:
    """Return what trains a network for one more epoch, and returns the images a second."""
    optimizer = keras.optimizers.Adam(wanted.lr)
    model.compile(optimizer=optimizer, jit_compile=xla(), steps_per_execution=steps_per_execution)
    epochs = itertools.count()

    def fit() -> None:
        model.fit(Epoch(first_schedule(wanted, len(data)), data.batch, next(epochs)), shuffle=False, verbose=0)

    return partial(speed, fit, len(data))


if __name__ == "__main__":
    main()
