"""Training speed of stage 1: images a second on random pictures, settings one after the other.

python benchmarks/train.py --recipe faces --try base_dim=16 --try base_dim=24,batch=100,precision=mixed_bfloat16
"""

from __future__ import annotations

import time

import click
import numpy as np

from training.dataset import Dataset
from training.epoch import Epoch
from training.images import Report
from training.recipes import recipe
from training.twostage import image_vae
from training.vae import xla


@click.command()
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=50, show_default=True, help="Minibatches timed, after one pass of as many.")
def main(name: str, trials: tuple[str, ...], steps: int) -> None:
    """Time the training step."""
    import keras  # after training, which chooses the backend's settings

    print(f"{keras.backend.backend()}: images/s of stage 1, recipe {name}")
    for trial in trials:
        wanted = recipe(name).set(part for part in trial.split(",") if part)
        shape = (wanted.batch * steps, wanted.side, wanted.side, wanted.channels)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data = Dataset(images, wanted.flip, Report())
        vae = image_vae(wanted)
        vae.compile(optimizer=keras.optimizers.Adam(wanted.lr), jit_compile=xla())
        began = time.perf_counter()
        vae.fit(Epoch(len(data), wanted.batch, data.batch, 0, 0), verbose=0)
        middle = time.perf_counter()
        vae.fit(Epoch(len(data), wanted.batch, data.batch, 0, 1), verbose=0)
        seconds = time.perf_counter() - middle
        weights = vae.encoder.count_params() / 1e6, vae.decoder.count_params() / 1e6
        print(
            f"{trial or 'as it is':50} {len(data) / seconds:9.1f} images/s, first pass {middle - began:.1f} s, "
            f"encoder {weights[0]:.1f} M, decoder {weights[1]:.1f} M weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
