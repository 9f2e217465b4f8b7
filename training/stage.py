"""Train one VAE, of either stage, so that it survives being stopped.

Training goes in pieces of an epoch. A piece ends with the epoch, when it is time to save, or when the
user or the system asks to stop; the next one goes on at the same minibatch, in this process or a later
one. Data order and noise are functions of the seed and the position, so pieces change no result.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from training.epoch import Epoch
from training.run import Record, Run
from training.vae import VAE, xla

SAVE_EVERY = 60.0  # seconds of work that a power cut may cost
ACTIVE_BELOW = 0.8  # mean posterior variance above which a latent counts as inactive (section 3)


class Data(Protocol):
    """Anything a VAE can be trained on: pictures, or posteriors."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[Any]:
        """Return the items at `indices`; random draws come from `rng`."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains; `halve_every` is in epochs, `items` are an epoch's."""

    stage: int
    items: int
    epochs: int
    batch: int
    lr: float
    halve_every: int
    seed: int


class Watcher(Protocol):
    """Is told how a stage goes. `step` comes after every minibatch, `epoch` after every epoch."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: Record) -> None: ...


class StopRequest:
    """Whether SIGINT or SIGTERM has come. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the length of a block."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


class Stopped(Exception):
    """Training was asked to stop and has saved; `signal` says by what."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def train(vae: VAE, data: Data, schedule: Schedule, run: Run, watcher: Watcher, stop: StopRequest) -> None:
    """Train a stage to its last epoch, resuming where the run directory says.

    Raises:
        Stopped: a signal came; everything is saved.
        RunError: the saved state does not fit.
    """
    size = min(schedule.batch, schedule.items)
    steps = schedule.items // size
    rate = keras.optimizers.schedules.ExponentialDecay(
        schedule.lr, decay_steps=schedule.halve_every * steps, decay_rate=0.5, staircase=True
    )
    vae.compile(optimizer=keras.optimizers.Adam(rate), jit_compile=xla())
    vae.optimizer.build(vae.trainable_variables)
    vae.encoder.jit_compile = xla()  # for the epochs' records
    # Weights, the policy's state and the noise's seed; running means start anew with every piece.
    others = {id(variable) for variable in (*vae.metrics_variables, *vae.optimizer.variables)}
    variables = [variable for variable in vae.variables if id(variable) not in others]
    variables += vae.optimizer.variables
    at = run.load_state(schedule.stage, variables) or {"epoch": 0, "step": 0, "sums": {}, "seconds": 0.0}
    run.forget(schedule.stage, at["epoch"])

    saved = time.monotonic()
    while at["epoch"] < schedule.epochs:
        began = time.monotonic()
        piece = _Piece(schedule, at, size, watcher, stop, until=saved + SAVE_EVERY)
        epoch = Epoch(schedule.items, size, data.batch, schedule.seed + schedule.stage, at["epoch"], at["step"])
        logs = vae.fit(epoch, shuffle=False, verbose=0, callbacks=[piece]).history
        for name, values in logs.items():
            at["sums"][name] = at["sums"].get(name, 0.0) + values[-1] * piece.steps
        at["step"] += piece.steps
        at["seconds"] += time.monotonic() - began
        if at["step"] == steps:
            record = _record(vae, data, schedule, at, steps * size)
            run.append(record)
            watcher.epoch(schedule, record)
            at = {"epoch": at["epoch"] + 1, "step": 0, "sums": {}, "seconds": 0.0}
        if stop.signal is not None or time.monotonic() > saved + SAVE_EVERY or at["epoch"] == schedule.epochs:
            run.save_state(schedule.stage, variables, at)
            saved = time.monotonic()
        if stop.signal is not None:
            raise Stopped(stop.signal)


class _Piece(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """Count a piece's minibatches, tell the watcher, and end the piece when asked."""

    def __init__(
        self, schedule: Schedule, at: Record, size: int, watcher: Watcher, stop: StopRequest, until: float
    ) -> None:
        super().__init__()
        self.steps = 0
        self.schedule, self.at, self.size = schedule, at, size
        self.watcher, self.stop, self.until = watcher, stop, until

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this after every minibatch."""
        self.steps += 1
        images = (self.at["step"] + self.steps) * self.size
        self.watcher.step(self.schedule, self.at["epoch"], images, logs or {})
        if self.stop.signal is not None or time.monotonic() > self.until:
            self.model.stop_training = True


def _record(vae: VAE, data: Data, schedule: Schedule, at: Record, images: int) -> Record:
    """Return the epoch's record: means over its minibatches, and what the latents look like now."""
    means = {name: total / at["step"] for name, total in at["sums"].items()}
    some = np.arange(min(len(data), 1000))
    mean, sd = posteriors(vae.encoder, data.batch(some, np.random.default_rng(schedule.seed)), vae.peak)
    return {
        "stage": schedule.stage,
        "epoch": at["epoch"],
        "images": (at["epoch"] + 1) * images,
        "images_per_second": round(images / at["seconds"], 1),
        "lr": float(keras.ops.convert_to_numpy(vae.optimizer.learning_rate)),
        **means,
        **latent_summary(mean, sd),
    }


def posteriors(
    encoder: keras.Model, items: npt.NDArray[Any], peak: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return (mean, sd) of each item's posterior, each float32 [n, latent]."""
    mean, log_sd = encoder.predict(items.astype(np.float32) / np.float32(peak), batch_size=500, verbose=0)
    return mean, np.exp(log_sd)


def latent_summary(mean: npt.NDArray[np.float32], sd: npt.NDArray[np.float32]) -> Record:
    """Return how many latents are active, and the variance law: their total variance, 1 when KL works."""
    variance = np.mean(np.square(sd, dtype=np.float64), axis=0)
    return {
        "active": int(np.sum(variance < ACTIVE_BELOW)),
        "latents": int(mean.shape[1]),
        "variance_law": float(np.mean(np.var(mean, axis=0, dtype=np.float64) + variance)),
    }
