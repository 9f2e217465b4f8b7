"""Train the autoencoder of one stage, so that it can be stopped at any minibatch and resumed.

An epoch is trained in pieces. A piece ends with the epoch, when it is time to save, at the minibatches of the first
epoch where the latents are traced, or when the user or the system asks to stop. The next piece begins at the next
minibatch, in this process or a later one. Data order and noise are functions of the seed and the position, so the
pieces change no result.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from training.errors import Diverged
from training.fit import devices
from training.fit.batches import Epoch
from training.fit.execution import Execution
from training.fit.stop import StopRequest
from training.model.autoencoder import Autoencoder, xla
from training.model.latents import infer, latent_summary, posterior_variance, posteriors, squared_error
from training.record.run import Run
from training.record.stage import Observer, Position, Schedule, setting_of
from training.types import Float32Array, IndexArray, Record

LOOK_EVERY = 1.0  # seconds between checks for NaN and infinity: each check waits for the device
TRACED = 40  # minibatches of the first epoch after which the latents' variances are recorded (figure 6)
RECORDED = 1000  # pictures that an epoch's record of the latents is made from


class Data(Protocol):
    """Anything an autoencoder can be trained on: pictures, or posteriors."""

    def __len__(self) -> int: ...

    def batch(self, indices: IndexArray, rng: np.random.Generator) -> npt.NDArray[Any]:
        """Return the items at `indices`; random draws come from `rng`."""


def train_stage(
    model: Autoencoder,
    data: Data,
    schedule: Schedule,
    run: Run,
    observer: Observer,
    stop: StopRequest,
    execution: Execution,
    validation: Data | None = None,
) -> None:
    """Train a stage to its last epoch, resuming where the run directory says.

    Raises:
        Stopped: a signal came; everything is saved.
        Diverged: a loss term or weight became NaN or infinite; the last checkpoint is kept.
        RunError: the saved state does not fit.
    """
    size, steps = schedule.size, schedule.steps
    model.compile(
        optimizer=keras.optimizers.Adam(_Rate(schedule), beta_1=schedule.momentum),
        jit_compile=xla(),
        steps_per_execution=min(execution.steps_per_execution, steps),
    )
    devices.adapt(model)
    model.optimizer.build(model.trainable_variables)
    # The weights, the policy's state and the noise's seed. The metrics' running means start anew with every piece.
    others = {id(variable) for variable in (*model.metrics_variables, *model.optimizer.variables)}
    variables = [variable for variable in model.variables if id(variable) not in others]
    variables += model.optimizer.variables
    at = run.load_state(schedule.stage, variables) or Position()
    run.forget(schedule.stage, at.epoch, at.step)
    if at != Position() and at.epoch < schedule.epochs:
        observer.note(f"going on in epoch {at.epoch + 1}/{schedule.epochs} of stage {schedule.stage}, step {at.step}")

    traced = _traced(steps) if schedule.stage == 1 else []
    saved = time.monotonic()
    while at.epoch < schedule.epochs:
        began = time.monotonic()
        end = next((step for step in traced if step > at.step), steps) if at.epoch == 0 else steps
        piece = _Piece(schedule, at, size, observer, stop, until=saved + execution.save_every)
        epoch = Epoch(schedule, data.batch, at.epoch, at.step, end)
        logs = model.fit(epoch, shuffle=False, verbose=0, callbacks=[piece]).history
        if bits := int(logs["non_finite"][-1]):
            _diverged(" and ".join(name for i, name in enumerate(model.TERMS) if bits >> i & 1), schedule, at, run)
        means = {name: values[-1] for name, values in logs.items()}
        at = at.after(piece.steps, means, time.monotonic() - began)
        if at.epoch == 0 and at.step in traced:
            run.append({"step": at.step, "latent_variance": _variance(model, data, schedule, 200)}, "trace")
        if at.step == steps:
            record = _record(model, data, schedule, at, steps * size, validation)
            run.append(record)
            observer.epoch(schedule, record)
            at = Position(at.epoch + 1)
        if stop.signal is not None or time.monotonic() > saved + execution.save_every or at.epoch == schedule.epochs:
            _check_weights(variables, schedule, at, run)
            run.save_state(schedule.stage, variables, at)
            saved = time.monotonic()
        stop.check()


class _Rate(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]  # Keras ships no types
    """A schedule's learning rate at each minibatch."""

    def __init__(self, schedule: Schedule) -> None:
        self.halved = keras.optimizers.schedules.ExponentialDecay(
            schedule.lr, decay_steps=schedule.halve_every * schedule.steps, decay_rate=0.5, staircase=True
        )
        self.warm_up = schedule.warm_up

    def __call__(self, step: Any) -> Any:
        rate = self.halved(step)
        if not self.warm_up:
            return rate
        return rate * keras.ops.minimum((keras.ops.cast(step, "float32") + 1) / self.warm_up, 1.0)


def _traced(steps: int) -> list[int]:
    """Return the minibatches of the first epoch after which the latents are traced: more of them near its start."""
    return sorted({int(step) for step in np.geomspace(1, steps, min(TRACED, steps)).round()})


class _Piece(keras.callbacks.Callback):  # type: ignore[misc]  # Keras ships no types
    """Counts minibatches, tells the observer, and ends the piece on request or at a loss term that is not finite."""

    def __init__(
        self, schedule: Schedule, at: Position, size: int, observer: Observer, stop: StopRequest, until: float
    ) -> None:
        super().__init__()
        self.steps = 0
        self.schedule, self.at, self.size = schedule, at, size
        self.observer, self.stop, self.until = observer, stop, until
        self.look = time.monotonic() + LOOK_EVERY

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Keras calls this after every execution, with the index that the last minibatch of a full one would have."""
        self.steps = min(batch + 1, self.params["steps"])
        images = (self.at.step + self.steps) * self.size
        self.observer.step(self.schedule, self.at.epoch, images, logs or {})
        if devices.workers() > 1 and self.schedule.stage == 1:
            return  # all machines must end a piece at the same minibatch, or they wait for each other forever
        now = time.monotonic()
        diverged = False
        if now > self.look:
            diverged, self.look = float((logs or {}).get("non_finite", 0)) > 0, now + LOOK_EVERY
        if self.stop.signal is not None or now > self.until or diverged:
            self.model.stop_training = True


def _check_weights(variables: list[Any], schedule: Schedule, at: Position, run: Run) -> None:
    """Raise Diverged if a weight is NaN or infinite, so that the last good checkpoint is not overwritten."""
    for variable in variables:
        if not np.all(np.isfinite(np.asarray(variable))):
            _diverged(f"the weight {variable.path}", schedule, at, run)


def _diverged(what: str, schedule: Schedule, at: Position, run: Run) -> None:
    last = run.saved_position(schedule.stage)
    kept = f"the checkpoint of epoch {last.epoch + 1}, minibatch {last.step}, is kept" if last else "none was saved"
    rate = setting_of(schedule.stage, "lr")
    lower = f"with a lower {rate} ({rate} is {schedule.lr:g})"
    where = " into another --out" if last else ""
    wider = " or a wider precision" if schedule.stage == 1 else ""
    cure = f"Train anew{where} {lower}{wider}"
    if schedule.stage == 2 and last:  # what comes before it is finished, and stays
        cure = f"Delete state/stage2.npz there, and the same command {lower} trains stage 2 anew"
    if schedule.stage == 3:
        cure = f"The same command {lower} sharpens anew, with epochs3=0 not at all"
    raise Diverged(
        f"stage {schedule.stage} diverged in epoch {at.epoch + 1}: {what} stopped being finite; {kept} in "
        f"{run.path}. {cure}"
    )


def _record(
    model: Autoencoder, data: Data, schedule: Schedule, at: Position, images: int, validation: Data | None
) -> Record:
    """Return the epoch's record: means over its minibatches, and what the latents look like now."""
    means = {name: total / at.step for name, total in at.sums.items() if name != "non_finite"}
    record: Record = {
        "stage": schedule.stage,
        "epoch": at.epoch + 1,
        "images": (at.epoch + 1) * images,
        "images_per_second": round(images / at.seconds, 1),
        "lr": schedule.rate(at.epoch),
        **means,
    }
    if model.encoder.trainable:
        mean, sd = posteriors(model.encoder, _some(data, schedule, RECORDED), model.input_scale)
        record |= {**latent_summary(mean, sd), "latent_variance": _rounded(sd)}
    if validation is not None:
        items = _some(validation, schedule, RECORDED)
        decoded = infer(model.decoder, posteriors(model.encoder, items, model.input_scale)[0])[0]
        record["validation_mse"] = squared_error(items, model.input_scale, decoded)
    return record


def _some(data: Data, schedule: Schedule, count: int) -> npt.NDArray[Any]:
    """Return `count` items, evenly: the first ones of sorted files may be of one class. Each call draws the same."""
    indices = np.linspace(0, len(data) - 1, min(len(data), count)).astype(np.intp)
    return data.batch(indices, np.random.default_rng(schedule.seed))


def _variance(model: Autoencoder, data: Data, schedule: Schedule, count: int) -> list[float]:
    return _rounded(posteriors(model.encoder, _some(data, schedule, count), model.input_scale)[1])


def _rounded(sd: Float32Array) -> list[float]:
    """Return each latent's mean posterior variance, to four places."""
    return [round(float(value), 4) for value in posterior_variance(sd)]
