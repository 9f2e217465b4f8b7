"""Training speed of stage 1 on random pictures and the CPU, by each backend, beside a loop written for torch.

    python benchmarks/train.py --try base_dim=16 --try base_dim=24,batch=100
    python benchmarks/train.py --torch torchvenv/bin/python

torch is not among this project's packages: python -m venv torchvenv && torchvenv/bin/pip install torch keras click
pillow makes an interpreter that has what is needed.

Ours trains as train-vae does, by Keras, on each backend that is installed. The peer is the same network, loss,
optimiser and data as one would write them for torch: a DataLoader, and channels last. In bfloat16 ours is Keras' mixed
precision and the peer's is autocast, where the processor multiplies bfloat16. The pipeline is what delivers our
minibatches, timed by a network that does nothing. Each runtime is a process of its own, and all take turns.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import runtimes
from measure import Row, Table, finish, interleave, json_option, machine
from runtimes import Peers

BACKENDS = ("tensorflow", "jax", "torch")
PEER = "a loop for torch"
FAST = "mixed_bfloat16"
MULTIPLIES = {"avx512_bf16", "amx_bf16", "bf16"}  # instruction sets, any of which has bfloat16 products


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--recipe", "name", default="faces", show_default=True)
@click.option("--try", "trials", multiple=True, default=("",), help="Settings, KEY=VALUE[,KEY=VALUE ...] (repeatable).")
@click.option("--steps", default=50, show_default=True, help="Minibatches a round.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(BACKENDS), default=BACKENDS, help="Ours are (repeatable)."
)
@click.option("--torch", "python", metavar="PYTHON", help="An interpreter that has torch, keras, click and pillow.")
@click.option("--compile", "compiled", is_flag=True, help="Have torch compile its loop as well, which takes minutes.")
@json_option
def main(
    context: click.Context,
    name: str,
    trials: tuple[str, ...],
    steps: int,
    rounds: int,
    backends: tuple[str, ...],
    python: str | None,
    compiled: bool,
    report: Path | None,
) -> None:
    """Print images a second, a table for each trial."""
    if context.invoked_subcommand:
        return
    from training import RECIPES

    pythons = {each: python if each == "torch" and python else sys.executable for each in backends}
    missing = [each for each, path in pythons.items() if path == sys.executable and not find_spec(each)]
    pythons = {each: path for each, path in pythons.items() if each not in missing}
    left_out = [f"{each}: it is not installed here" for each in missing]
    precisions = ["float32"]
    if MULTIPLIES & set(machine()["sets"]):
        precisions.append(FAST)
    else:
        left_out.append("bfloat16: this processor has none")
    tables = []
    versions: dict[str, str] = {}
    for trial in trials:
        recipe = RECIPES[name]().set(part for part in trial.split(",") if part)
        count = recipe.batch * steps
        with ExitStack() as stack:
            processes = [
                stack.enter_context(
                    runtimes.runtime(
                        each,
                        [
                            path,
                            __file__,
                            "answer",
                            each,
                            name,
                            trial,
                            str(steps),
                            *(["--compile"] * compiled),
                            *precisions,
                        ],
                        {"KERAS_BACKEND": each, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                    )
                )
                for each, path in pythons.items()
            ]
            work: dict[str, Callable[[], float]] = {
                peer: partial(each.measure, peer, count, 0.0) for each in processes for peer in each.names
            }
            rows = [Row(each, "images/s", values) for each, values in interleave(work, rounds).items()]
            versions |= {each: version for process in processes for each, version in process.versions.items()}
        against = [each for each in (f"{PEER}, float32",) if each in work] or [rows[0].name]
        title = f"Stage 1 of the recipe {name}, {trial or 'as it is'}, {steps} steps a round"
        tables.append(Table(title, rows, against))
        tables[-1].show()
    finish(report, __doc__, tables, left_out, versions)


@main.command(hidden=True)
@click.argument("backend")
@click.argument("name")
@click.argument("trial")
@click.argument("steps", type=int)
@click.argument("precisions", nargs=-1)
@click.option("--compile", "compiled", is_flag=True)
def answer(backend: str, name: str, trial: str, steps: int, precisions: tuple[str, ...], compiled: bool) -> None:
    """Be one of the runtimes' processes: what it is asked to make is an epoch of so many steps."""

    def make() -> tuple[Peers, list[str]]:
        from training import RECIPES

        wanted = RECIPES[name]().set(part for part in trial.split(",") if part)
        shape = (wanted.batch * steps, wanted.side, wanted.side, wanted.channels)
        pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        peers: dict[str, Callable[[Any], Any]] = {}
        for precision in precisions:
            recipe = replace(wanted, precision=precision)
            peers[f"ours, {backend}, {precision}"] = ours(recipe, pictures)
            if backend == "torch":
                peers[f"{PEER}, {precision}"] = loop(recipe, pictures)
                if compiled:
                    peers[f"{PEER}, compiled, {precision}"] = loop(recipe, pictures, compiled)
        if backend == "tensorflow":
            peers["the pipeline alone"] = ours(wanted, pictures, nothing=True)
        return peers, []

    runtimes.answer(make, 1)  # noise that nobody takes


def ours(recipe: Any, pictures: Any, nothing: bool = False) -> Callable[[Any], None]:
    """Return what trains stage 1, or a network that does nothing, for one more epoch."""
    # Not of the public interface, which trains whole runs: a step is timed here without what a run keeps and shows.
    from training.data.dataset import Dataset
    from training.data.splits import Report
    from training.fit.batches import Epoch
    from training.model.autoencoder import xla
    from training.model.build import image_autoencoder
    from training.record.stage import first_schedule

    import keras  # isort: skip  # after training, which chooses the backend's settings

    data = Dataset(pictures, recipe.flip, Report())
    model = null() if nothing else image_autoencoder(recipe)
    model.compile(optimizer=keras.optimizers.Adam(recipe.lr), jit_compile=xla())
    epochs = itertools.count()

    def fit(_: Any) -> None:
        model.fit(Epoch(first_schedule(recipe, len(data)), data.batch, next(epochs)), shuffle=False, verbose=0)

    return fit


def null() -> Any:
    """Return a network that takes pictures and learns one number."""
    import keras

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


def loop(recipe: Any, pictures: Any, compiled: bool = False) -> Callable[[Any], None]:
    """Return what trains the same network for one more epoch, as one would write it for torch."""
    import torch
    from networks import Decoder, Encoder
    from torch.utils.data import DataLoader, TensorDataset

    encoder, decoder = (each(recipe).to(memory_format=torch.channels_last) for each in (Encoder, Decoder))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], recipe.lr)
    loader = DataLoader(TensorDataset(torch.from_numpy(pictures)), recipe.batch, shuffle=True, drop_last=True)
    values = pictures[0].size
    lowest = torch.tensor(1.0)
    bfloat16 = recipe.precision == FAST

    def losses(images: Any) -> tuple[Any, Any]:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            mean, log_sd = encoder(images)
            pixels = decoder(mean + torch.exp(log_sd) * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + torch.exp(2 * log_sd) - 2 * log_sd - 1).sum(1).mean()
        return (pixels - images).square().mean(), kl

    if compiled:
        losses = torch.compile(losses)

    def epoch(_: Any) -> None:
        for (batch,) in loader:
            images = batch.permute(0, 3, 1, 2).float() / 255
            if recipe.flip:
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
            mse, kl = losses(images)
            torch.minimum(lowest, 0.99 * lowest + 0.01 * mse.detach(), out=lowest)
            loss = kl + values * (mse / (2 * lowest) + lowest.log() / 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


if __name__ == "__main__":
    main()
