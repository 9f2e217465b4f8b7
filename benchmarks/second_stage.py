"""Training speed of stage 2, against the matrix products that it cannot do without.

A step's products alone - each dense layer's forward, and its two backward ones - are timed beside whole
training steps, in turn; the ratio is how much of a step is not overhead.

python benchmarks/second_stage.py --recipe faces --try second_dim=2048
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import Row, Table, finish, interleave, json_option, speed

from training import RECIPES

# Not of the public interface, which trains whole runs: a step is timed here without what a run keeps and shows.
from training.fit.batches import Epoch
from training.model.autoencoder import xla
from training.model.build import latent_vae
from training.model.latents import Posteriors
from training.record.stage import second_schedule

PRODUCTS = "their matrix products alone"


@click.command()
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=30, show_default=True, help="Minibatches a round.")
@click.option("--rounds", default=5, show_default=True)
@json_option
def main(name: str, trials: tuple[str, ...], steps: int, rounds: int, report: Path | None) -> None:
    """Time the training step and its matrix products, interleaved."""
    import keras  # after training, which chooses the backend's settings

    tables = []
    for trial in trials:
        wanted = RECIPES[name]().set(part for part in trial.split(",") if part)
        rng = np.random.default_rng(0)
        size = wanted.batch2 or wanted.batch
        shape = (size * steps, wanted.latent_dim)
        latents = Posteriors(rng.standard_normal(shape, np.float32), np.full(shape, 0.1, np.float32))
        vae = latent_vae(wanted)
        vae.compile(optimizer=keras.optimizers.Adam(wanted.lr2), jit_compile=xla())
        kernels = [weight for weight in vae.trainable_weights if weight.name == "kernel"]
        multiply = products([tuple(kernel.shape) for kernel in kernels], size)

        def train() -> None:
            vae.fit(Epoch(second_schedule(wanted, len(latents)), latents.batch, 0), shuffle=False, verbose=0)  # noqa: B023

        def bare() -> None:
            for _ in range(steps):
                multiply()  # noqa: B023

        work = {"training steps": train, PRODUCTS: bare}
        found = interleave({each: partial(speed, run, len(latents)) for each, run in work.items()}, rounds)
        flops = 6 * sum(int(np.prod(kernel.shape)) for kernel in kernels)
        rows = [Row(each, "latents/s", values) for each, values in found.items()]
        rows.append(Row(PRODUCTS, "GFLOP/s", [value * flops / 1e9 for value in found[PRODUCTS]]))
        title = f"Stage 2 by {keras.backend.backend()}, recipe {name}, {trial or 'as it is'}"
        tables.append(Table(title, rows, [PRODUCTS]))
        tables[-1].show()
    finish(report, __doc__, tables)


def products(shapes: list[tuple[int, ...]], batch: int) -> Callable[[], object]:
    """Return a compiled function of a step's matrix products, on the backend's own device."""
    import keras
    from keras import ops

    rng = np.random.default_rng(0)
    tensors = [
        tuple(ops.convert_to_tensor(rng.standard_normal(size, np.float32)) for size in ((batch, i), (i, o), (batch, o)))
        for i, o in shapes
    ]

    def step(*flat: Any) -> Any:
        total = 0.0
        for x, kernel, gradient in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            made = (x @ kernel, gradient @ ops.transpose(kernel), ops.transpose(x) @ gradient)
            total = total + sum(each[0, 0] for each in made)
        return total

    flat = [tensor for each in tensors for tensor in each]
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(step)
        return lambda: compiled(*flat).block_until_ready()
    import tensorflow

    compiled = tensorflow.function(step)
    return lambda: compiled(*flat).numpy()


if __name__ == "__main__":
    main()
