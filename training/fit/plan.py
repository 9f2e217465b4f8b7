"""The recipe `auto`: settings that fit the pictures, the machine and the time.

Measured, and not looked up: the pictures are looked at, and real training steps are timed on this machine. What is
decided here is data afterwards: the plan's recipe goes into the run directory, and resuming decides nothing again.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.data.survey import Survey
from training.fit.batches import Epoch
from training.model.autoencoder import Autoencoder, xla
from training.model.build import image_autoencoder, latent_vae
from training.model.latents import Posteriors
from training.recipe import Recipe
from training.record.stage import Schedule, first_schedule, latent_count, second_schedule, third_schedule
from training.types import IndexArray, UInt8Array

EPOCHS = 60  # pieces that each stage's steps are counted in; the rate is halved after each third of them
WIDTHS = (8, 12, 16, 24, 32, 48, 64)
PROBED = {"cpu": 8, "gpu": 32}  # the width that is timed first
GROWTH = 1.7  # a step's time grows with the width to this power: its products by 2, but narrow layers take longer each
SHARE = 0.78  # of the time that is for stage 1; stage 2 has the rest, less what starting and drawing takes
OVERHEAD = 60.0  # seconds to start, to compile both stages' steps, and to draw; as measured on two cores
SHORT = 800  # steps of the narrowest network below which the pictures are made smaller
PASSES, LEAST = 600, 2000  # over the pictures at most, but no fewer steps than these
FEW_STEPS, MOMENTUM, QUICK_MOMENTUM = 1000, 0.99, 0.95  # the balance has to arrive within a run: benchmarks/balance.py
TIMED = 2.0  # seconds of steps that are timed

# What the networks' shapes depend on: a warm start takes these from the run that it starts from.
SHAPES = ["side", "channels", "first_stage", "num_scale", "blocks_per_scale", "depth_per_block", "base_dim", "fc_dim"]
SHAPES += ["kernel", "latent_dim"]


@dataclass(frozen=True)
class Plan:
    """What will be trained, and what it takes.

    Attributes:
        recipe: With every setting decided.
        pictures: That it trains on, those held back not counted.
        weights: Of stage 1 and of stage 2.
        memory: Bytes that this process had when it timed stage 1's steps.
        seconds: Of stage 1 and of stage 2, as measured.
    """

    recipe: Recipe
    pictures: int
    weights: tuple[int, int]
    memory: int
    seconds: tuple[float, float]

    def __str__(self) -> str:
        recipe = self.recipe
        first = first_schedule(recipe, self.pictures)
        second = second_schedule(recipe, latent_count(recipe, self.pictures))
        steps = [schedule.steps * schedule.epochs for schedule in (first, second)]
        passes = steps[0] * first.size / self.pictures
        facts = [
            f"{self.pictures:,} pictures as {recipe.side}x{recipe.side} {'colour' if recipe.channels == 3 else 'grey'}",
            "mirror images too" if recipe.flip else "no mirror images",
            f"{recipe.validation:.0%} more held back" if recipe.validation else "none held back",
        ]
        lines = [
            f"plan: {', '.join(facts)}",
            f"  stage 1: base_dim {recipe.base_dim}, {recipe.latent_dim} latents, "
            f"{self.weights[0] / 1e6:.1f} million weights; "
            f"{steps[0]:,} steps of {first.size} pictures ({passes:,.0f} passes), "
            f"about {self.seconds[0] / 60:.1f} min",
            f"  stage 2: {recipe.second_dim} units, {self.weights[1] / 1e6:.1f} million weights; "
            f"{steps[1]:,} steps of {second.size} latents, about {self.seconds[1] / 60:.1f} min",
            f"  about {self.memory / 1e9:.1f} GB of memory; with starting and drawing "
            f"{(sum(self.seconds) + OVERHEAD) / 60:.1f} min from now",
        ]
        if recipe.epochs3:
            third = third_schedule(recipe, self.pictures)
            lines.append(f"  sharpening comes on top: {third.steps * third.epochs:,} steps of {third.size}, not timed")
        return "\n".join(line for line in lines if self.weights[1] or not line.startswith("  stage 2"))


def plan(pictures: Survey, minutes: float, settings: Iterable[str] = (), like: Recipe | None = None) -> Plan:
    """Decide how to train on pictures, in so many minutes on this machine.

    Args:
        pictures: What they are like.
        minutes: For all of it, on this machine as busy as it is now.
        settings: KEY=VALUE that are decided already.
        like: A recipe whose networks' shapes are to be taken, for a warm start from it.

    Raises:
        RecipeError: a setting is not valid.
    """
    given = [each.partition("=")[0] for each in settings]
    drafted = _draft(pictures)
    if like:
        drafted = replace(drafted, **{key: getattr(like, key) for key in SHAPES})
        given = [*given, *SHAPES]
    drafted = drafted.set(settings)
    if "num_scale" not in given:
        drafted = replace(drafted, num_scale=_scales(drafted.side))
    count = drafted.limit or pictures.count
    count = max(2, round(min(count, pictures.count) * (1 - drafted.validation)))
    began = time.monotonic()

    def left() -> float:
        """Return the seconds that there are for steps; timing them takes some of the minutes too."""
        return max(minutes * 60 - OVERHEAD - (time.monotonic() - began), 10.0)

    seconds, weights = _first(drafted, count)
    chosen = fitted(drafted, seconds, left() * SHARE, count, given)
    if chosen != drafted:
        seconds, weights = _first(chosen, count)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    first = first_schedule(chosen, count)
    seconds2, weights2 = _second(chosen, count)
    budget = left()
    steps = min(int(budget * SHARE / seconds), max(PASSES * count // first.size, LEAST))
    steps2 = min(
        int(budget * (1 - SHARE) / seconds2), max(10 * PASSES * count // second_schedule(chosen, count).size, LEAST)
    )
    decided: dict[str, Any] = {
        "epoch_steps": max(1, steps // chosen.epochs),
        "halve_every": max(1, chosen.epochs // 3),
        "epoch_steps2": max(1, steps2 // chosen.epochs2),
        "halve_every2": max(1, chosen.epochs2 // 3),
    }
    chosen = replace(chosen, **{key: value for key, value in decided.items() if key not in given})
    # Not all that there is time for, where some of it was set.
    first, second = first_schedule(chosen, count), second_schedule(chosen, latent_count(chosen, count))
    total, total2 = (each.steps * each.epochs for each in (first, second))
    if "balance_momentum" not in given:
        momentum = MOMENTUM if like is None and total >= FEW_STEPS else QUICK_MOMENTUM
        chosen = replace(chosen, balance_momentum=momentum)
    return Plan(chosen, count, (weights, weights2), memory, (total * seconds, total2 * seconds2))


def _draft(pictures: Survey) -> Recipe:
    """Return what the pictures alone decide."""
    side = 64 if pictures.side >= 48 else 32 if pictures.side >= 24 else 16
    fast = on_gpu()
    return Recipe(
        name="auto",
        side=side,
        channels=1 if pictures.grey else 3,
        flip=pictures.mirrors,
        validation=0.0 if pictures.count < 400 else max(0.01, min(0.05, 1000 / pictures.count)),
        base_dim=PROBED["gpu" if fast else "cpu"],
        latent_dim=64 if side > 16 else 32,
        batch_norm_momentum=0.99,
        second_dim=1024 if fast else 512,
        batch=128 if fast else 32,
        epochs=EPOCHS,
        lr=1e-3,
        batch2=128,
        epochs2=EPOCHS,
        lr2=1e-3,
        precision="mixed_bfloat16" if fast or _has_bfloat16() else "float32",
    )


def _scales(side: int) -> int:
    """Return the scales of an encoder whose last one is 8 pixels wide, as the paper's is."""
    return max(2, side.bit_length() - 3)


def fitted(drafted: Recipe, seconds: float, budget: float, count: int, given: Collection[str]) -> Recipe:
    """Return a draft with the widest network that has steps enough for so many pictures within the time.

    Where even the narrowest has far too few, pictures are made smaller.

    Args:
        drafted: A recipe; what is given is not changed.
        seconds: That a step of it takes.
        budget: Seconds for all steps.
        count: Pictures.
        given: Names of settings.
    """
    if "base_dim" in given:
        return drafted
    wanted = min(20_000, max(LEAST, 3000 * (count / 700) ** 0.35))

    def steps(base_dim: int) -> float:
        return budget / (seconds * float((base_dim / drafted.base_dim) ** GROWTH))

    affordable = [width for width in WIDTHS if steps(width) >= wanted]
    if not affordable and steps(WIDTHS[0]) < SHORT and drafted.side > 32 and "side" not in given:
        smaller = replace(drafted, side=drafted.side // 2)
        if "num_scale" not in given:
            smaller = replace(smaller, num_scale=_scales(smaller.side))
        return fitted(smaller, seconds / 4, budget, count, given)
    return replace(drafted, base_dim=max(affordable, default=WIDTHS[0]))


class _Noise:
    """Pictures that nobody drew, to time steps with."""

    def __init__(self, recipe: Recipe) -> None:
        self.shape = (recipe.side, recipe.side, recipe.channels)

    def batch(self, indices: IndexArray, rng: np.random.Generator) -> UInt8Array:
        return rng.integers(0, 256, (len(indices), *self.shape), np.uint8)


def _first(recipe: Recipe, count: int) -> tuple[float, int]:
    """Return the seconds that a step of stage 1 takes, and its weights."""
    model = image_autoencoder(recipe)
    weights = model.encoder.count_params() + model.decoder.count_params()
    return _timed(model, first_schedule(recipe, count), _Noise(recipe).batch), weights


def _second(recipe: Recipe, count: int) -> tuple[float, int]:
    """Return the seconds that a step of stage 2 takes, and its weights."""
    if "second-stage" not in recipe.priors:
        return 0.001, 0
    model = latent_vae(recipe)
    weights = model.encoder.count_params() + model.decoder.count_params()
    latents = np.zeros((count, recipe.latent_dim), np.float32)
    return _timed(model, second_schedule(recipe, count), Posteriors(latents, latents + 1).batch), weights


def _timed(model: Autoencoder, schedule: Schedule, draw: Any) -> float:
    """Return the seconds that a training step takes, in the longest of the passes that are timed."""
    model.compile(optimizer=keras.optimizers.Adam(schedule.lr), jit_compile=xla())
    steps, seconds = 2, 0.0
    _fit(model, schedule, draw, 2)  # compiles
    while seconds < TIMED / 2:
        began = time.perf_counter()
        _fit(model, schedule, draw, steps)
        seconds = time.perf_counter() - began
        if seconds < TIMED / 2:
            steps = max(2 * steps, min(10 * steps, int(steps * TIMED / seconds)))
    return seconds / steps


def _fit(model: Autoencoder, schedule: Schedule, draw: Any, steps: int) -> None:
    model.fit(Epoch(replace(schedule, epoch_steps=steps), draw, 0), shuffle=False, verbose=0)


def on_gpu() -> bool:
    """Tell whether there is a GPU to train on."""
    if keras.backend.backend() == "torch":  # of which Keras does not list devices
        return bool(import_module("torch").cuda.is_available())
    return bool(keras.distribution.list_devices("gpu"))


def _has_bfloat16() -> bool:
    """Tell whether the processor multiplies bfloat16, where training in it is half as fast again."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
