"""Training speed of stage 1: images a second on random pictures, settings one after the other.

Beside it the rate at which the input pipeline alone delivers them, to a network that does nothing.

python benchmarks/train.py --recipe faces --try base_dim=16 --try base_dim=24,batch=100,precision=mixed_bfloat16
"""

from __future__ import annotations

import time

import click
import numpy as np

from training.autoencoder import xla
from training.dataset import Dataset
from training.epoch import Epoch
from training.images import Report
from training.recipe import Recipe
from training.recipes import recipe
from training.twostage import image_autoencoder


@click.command()
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=50, show_default=True, help="Minibatches timed, after one pass of as many.")
@click.option("--steps-per-execution", default=1, show_default=True)
def main(name: str, trials: tuple[str, ...], steps: int, steps_per_execution: int) -> None:
    """Time the training step, and the input pipeline without it."""
    import keras  # after training, which chooses the backend's settings

    print(f"{keras.backend.backend()}: images/s of stage 1, recipe {name}")
    for trial in trials:
        wanted = recipe(name).set(part for part in trial.replace(";", ",").split(",") if part)
        shape = (wanted.batch * steps, wanted.side, wanted.side, wanted.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data = Dataset(images, wanted.flip, Report())
        model = image_autoencoder(wanted)
        trained = rate(model, data, wanted, steps_per_execution)
        piped = rate(null(shape[1:]), data, wanted, steps_per_execution)
        weights = model.encoder.count_params() / 1e6, model.decoder.count_params() / 1e6
        print(
            f"{trial or 'as it is':50} {trained:9.1f} images/s; pipeline alone {piped:,.0f}, "
            f"{piped / trained:.0f} times that; encoder {weights[0]:.1f} M, decoder {weights[1]:.1f} M weights",
            flush=True,
        )


def null(shape: tuple[int, ...]) -> object:
    """Return a network that takes pictures and learns one number."""
    import keras

    images = keras.Input(shape, dtype="uint8")
    pixel = keras.ops.cast(images[:, 0, 0, :1], "float32")
    return keras.Model(images, keras.layers.Dense(1)(pixel))


def rate(model: object, data: Dataset, wanted: Recipe, steps_per_execution: int) -> float:
    """Return the images a second of the second of two passes."""
    import keras

    model.compile(
        optimizer=keras.optimizers.Adam(wanted.lr),
        loss=None if hasattr(model, "encoder") else lambda _, value: value,
        jit_compile=xla(),
        steps_per_execution=steps_per_execution,
    )
    seconds = 0.0
    for epoch in (0, 1):
        began = time.perf_counter()
        model.fit(_labelled(model, Epoch(len(data), wanted.batch, data.batch, 0, epoch)), shuffle=False, verbose=0)
        seconds = time.perf_counter() - began
    return len(data) / seconds


def _labelled(model: object, epoch: Epoch) -> Epoch:
    """Give every minibatch a label where the network wants one."""
    if not hasattr(model, "encoder"):
        epoch.__class__ = _WithLabels
    return epoch


class _WithLabels(Epoch):
    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        (images,) = super().__getitem__(index)
        return images, np.zeros((len(images), 1), np.float32)


if __name__ == "__main__":
    main()
