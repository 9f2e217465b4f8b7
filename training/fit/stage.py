"""Train one autoencoder, of either stage, so that it survives being stopped.

Training goes in pieces of an epoch. A piece ends with the epoch, when it is time to save, where the first
epoch is traced, or when the user or the system asks to stop; the next one goes on at the same minibatch, in
this process or a later one. Data order and noise are functions of the seed and the position, so pieces
change no result.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from training.errors import Diverged
from training.fit import devices
from training.fit.batches import Epoch
from training.fit.stop import Stopped, StopRequest
from training.model.autoencoder import Autoencoder, xla
from training.record.run import Record, Run

LOOK_EVERY = 1.0  # seconds between looks at whether all numbers are numbers: each waits for the device
TRACED = 40  # points of the first epoch at which the latents' variances are kept (figure 6)
RECORDED = 1000  # pictures that an epoch's record of the latents is made from
ACTIVE_BELOW = 0.8  # mean posterior variance above which a latent counts as inactive (section 3)


class Data(Protocol):
    """Anything an autoencoder can be trained on: pictures, or posteriors."""

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

    @property
    def size(self) -> int:
        """Items a minibatch."""
        return min(self.batch, self.items)

    @property
    def steps(self) -> int:
        """Minibatches an epoch; what does not fill one is left out, other items each epoch."""
        return self.items // self.size


@dataclass(frozen=True)
class Execution:
    """How a stage is run on this machine: what it makes depends on none of it, but for rounding on several devices.

    Attributes:
        save_every: Seconds of work that a power cut may cost.
        steps_per_execution: Minibatches a call of the compiled function; more keep a GPU busier.
        devices: How many share a minibatch (`devices.spread`).
    """

    save_every: float = 60.0
    steps_per_execution: int = 1
    devices: str = "1"


class Watcher(Protocol):
    """Is told how a stage goes. `step` comes after every minibatch, `epoch` after every epoch."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: Record) -> None: ...


def train(
    model: Autoencoder,
    data: Data,
    schedule: Schedule,
    run: Run,
    watcher: Watcher,
    stop: StopRequest,
    execution: Execution,
    validation: Data | None = None,
) -> None:
    """Train a stage to its last epoch, resuming where the run directory says.

    Raises:
        Stopped: a signal came; everything is saved.
        Diverged: a number stopped being one; the last checkpoint is kept.
        RunError: the saved state does not fit.
    """
    size, steps = schedule.size, schedule.steps
    rate = keras.optimizers.schedules.ExponentialDecay(
        schedule.lr, decay_steps=schedule.halve_every * steps, decay_rate=0.5, staircase=True
    )
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        jit_compile=xla(),
        steps_per_execution=min(execution.steps_per_execution, steps),
    )
    devices.adapt(model)
    model.optimizer.build(model.trainable_variables)
    # Weights, the policy's state and the noise's seed; running means start anew with every piece.
    others = {id(variable) for variable in (*model.metrics_variables, *model.optimizer.variables)}
    variables = [variable for variable in model.variables if id(variable) not in others]
    variables += model.optimizer.variables
    at = run.load_state(schedule.stage, variables) or {"epoch": 0, "step": 0, "sums": {}, "seconds": 0.0}
    run.forget(schedule.stage, at["epoch"], at["step"])

    traced = _traced(steps) if schedule.stage == 1 else []
    saved = time.monotonic()
    with stop.deferring():
        while at["epoch"] < schedule.epochs:
            began = time.monotonic()
            end = next((step for step in traced if step > at["step"]), steps) if at["epoch"] == 0 else steps
            piece = _Piece(schedule, at, size, watcher, stop, until=saved + execution.save_every)
            epoch = Epoch(
                schedule.items, size, data.batch, schedule.seed + schedule.stage, at["epoch"], at["step"], end
            )
            logs = model.fit(epoch, shuffle=False, verbose=0, callbacks=[piece]).history
            _check(model, int(logs["blown"][-1]), schedule, at, run)
            for name, values in logs.items():
                at["sums"][name] = at["sums"].get(name, 0.0) + values[-1] * piece.steps
            at["step"] += piece.steps
            at["seconds"] += time.monotonic() - began
            if at["epoch"] == 0 and at["step"] in traced:
                run.append({"step": at["step"], "latent_variance": _variance(model, data, schedule, 200)}, "trace")
            if at["step"] == steps:
                record = _record(model, data, schedule, at, steps * size, validation)
                run.append(record)
                watcher.epoch(schedule, record)
                at = {"epoch": at["epoch"] + 1, "step": 0, "sums": {}, "seconds": 0.0}
            if (
                stop.signal is not None
                or time.monotonic() > saved + execution.save_every
                or at["epoch"] == schedule.epochs
            ):
                _check_weights(variables, schedule, at, run)
                run.save_state(schedule.stage, variables, at)
                saved = time.monotonic()
            if stop.signal is not None:
                raise Stopped(stop.signal)


def _traced(steps: int) -> list[int]:
    """Return the minibatches of the first epoch after which the latents are looked at: denser at the start."""
    return sorted({int(step) for step in np.geomspace(1, steps, min(TRACED, steps)).round()})


class _Piece(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """Count a piece's minibatches, tell the watcher, and end the piece when asked or when numbers blow up."""

    def __init__(
        self, schedule: Schedule, at: Record, size: int, watcher: Watcher, stop: StopRequest, until: float
    ) -> None:
        super().__init__()
        self.steps = 0
        self.schedule, self.at, self.size = schedule, at, size
        self.watcher, self.stop, self.until = watcher, stop, until
        self.look = time.monotonic() + LOOK_EVERY

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this after every execution; `batch` is its last minibatch, were all of its steps there."""
        self.steps = min(batch + 1, self.params["steps"])
        images = (self.at["step"] + self.steps) * self.size
        self.watcher.step(self.schedule, self.at["epoch"], images, logs or {})
        if devices.workers() > 1:
            return  # all end a piece at the same minibatch, or wait for each other forever
        now = time.monotonic()
        blown = False
        if now > self.look:
            blown, self.look = float((logs or {}).get("blown", 0)) > 0, now + LOOK_EVERY
        if self.stop.signal is not None or now > self.until or blown:
            self.model.stop_training = True


def _check(model: Autoencoder, blown: int, schedule: Schedule, at: Record, run: Run) -> None:
    """Raise Diverged where a term of the loss was not finite."""
    if blown:
        _diverged(" and ".join(name for i, name in enumerate(model.TERMS) if blown >> i & 1), schedule, at, run)


def _check_weights(variables: list[Any], schedule: Schedule, at: Record, run: Run) -> None:
    """Raise Diverged rather than save over a good checkpoint what cannot be trained on."""
    for variable in variables:
        if not np.all(np.isfinite(np.asarray(variable))):
            _diverged(f"the weight {variable.path}", schedule, at, run)


def _diverged(what: str, schedule: Schedule, at: Record, run: Run) -> None:
    last = run.saved_position(schedule.stage)
    kept = (
        f"the checkpoint of epoch {last['epoch'] + 1}, minibatch {last['step']}, is kept" if last else "none was saved"
    )
    rate = "lr" if schedule.stage == 1 else "lr2"
    raise Diverged(
        f"stage {schedule.stage} diverged in epoch {at['epoch'] + 1}: {what} stopped being finite; {kept} in "
        f"{run.path}. Train anew with a lower {rate} ({rate} is {schedule.lr:g}) or a wider precision"
    )


def _record(
    model: Autoencoder, data: Data, schedule: Schedule, at: Record, images: int, validation: Data | None
) -> Record:
    """Return the epoch's record: means over its minibatches, and what the latents look like now."""
    means = {name: total / at["step"] for name, total in at["sums"].items() if name != "blown"}
    mean, sd = posteriors(model.encoder, _some(data, schedule, RECORDED), model.peak)
    record = {
        "stage": schedule.stage,
        "epoch": at["epoch"],
        "images": (at["epoch"] + 1) * images,
        "images_per_second": round(images / at["seconds"], 1),
        "lr": float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)),
        **means,
        **latent_summary(mean, sd),
        "latent_variance": _rounded(sd),
    }
    if validation is not None:
        items = _some(validation, schedule, RECORDED)
        decoded = infer(model.decoder, posteriors(model.encoder, items, model.peak)[0])[0]
        record["validation_mse"] = float(np.mean(np.square(items / model.peak - decoded)))
    return record


def _some(data: Data, schedule: Schedule, count: int) -> npt.NDArray[Any]:
    """Return the first items, the same whenever asked."""
    return data.batch(np.arange(min(len(data), count)), np.random.default_rng(schedule.seed))


def _variance(model: Autoencoder, data: Data, schedule: Schedule, count: int) -> list[float]:
    return _rounded(posteriors(model.encoder, _some(data, schedule, count), model.peak)[1])


def _rounded(sd: npt.NDArray[np.float32]) -> list[float]:
    """Return each latent's mean posterior variance, to four places."""
    return [round(float(value), 4) for value in np.mean(np.square(sd, dtype=np.float64), axis=0)]


def posteriors(
    encoder: keras.Model, items: npt.NDArray[Any], peak: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return (mean, sd) of each item's posterior, each float32 [n, latent]; sd is 0 for deterministic encoders."""
    mean, *log_sd = infer(encoder, items.astype(np.float32) / np.float32(peak))
    return mean, np.exp(log_sd[0]) if log_sd else np.zeros_like(mean)


def infer(network: keras.Model, items: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Return each of a network's outputs for all items.

    It is called, not asked to `predict`, which of a network built for several devices would share items out,
    and on several machines wait for the others.
    """
    parts = [keras.tree.flatten(network(items[at : at + 500], training=False)) for at in range(0, len(items), 500)]
    return [
        np.concatenate([keras.ops.convert_to_numpy(each) for each in output]) for output in zip(*parts, strict=True)
    ]


def latent_summary(mean: npt.NDArray[np.float32], sd: npt.NDArray[np.float32]) -> Record:
    """Return how many latents are active, and the variance law: their total variance, 1 when KL works.

    No latent of a deterministic encoder is active or inactive.
    """
    variance = np.mean(np.square(sd, dtype=np.float64), axis=0)
    law = float(np.mean(np.var(mean, axis=0, dtype=np.float64) + variance))
    active = {"active": int(np.sum(variance < ACTIVE_BELOW))} if sd.any() else {}
    return {**active, "latents": int(mean.shape[1]), "variance_law": law}
