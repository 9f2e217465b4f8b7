"""The order in which an epoch visits the data, as Keras reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from training.record.stage import Schedule


def order(schedule: Schedule, epoch: int) -> npt.NDArray[np.intp]:
    """Return the items of an epoch's minibatches, in their order: indices [steps * size].

    Every pass over the items has another order, a function of the seed and the pass. An epoch is either a pass,
    whose last items are left out where they make no full minibatch; or it is a piece of all passes, one after the
    other, which leave out nothing.
    """
    wanted = schedule.steps * schedule.size
    first = epoch * schedule.items
    if schedule.epoch_steps:
        first = epoch * wanted
    passes = range(first // schedule.items, (first + wanted - 1) // schedule.items + 1)
    orders = [
        np.random.default_rng((schedule.seed + schedule.stage, each)).permutation(schedule.items) for each in passes
    ]
    return np.concatenate(orders)[first % schedule.items :][:wanted]


class Epoch(keras.utils.PyDataset):  # type: ignore[misc]  # Keras ships no types
    """An epoch of a stage, from minibatch `skip` on, up to `end`.

    The order and every random draw are functions of (seed, epoch, minibatch), so a resumed epoch continues exactly
    as the stopped one would have.

    Args:
        schedule: Of the stage.
        draw: Makes a minibatch of indices and a random generator of its own.
        epoch: Counts from 0.
        skip: Minibatches that are done.
        end: Where to stop; without it, at the epoch's end.
    """

    def __init__(
        self,
        schedule: Schedule,
        draw: Callable[[npt.NDArray[np.intp], np.random.Generator], npt.NDArray[Any]],
        epoch: int,
        skip: int = 0,
        end: int | None = None,
    ) -> None:
        super().__init__()
        self.batch = schedule.size
        self.draw = draw
        self.key = (schedule.seed + schedule.stage, epoch)
        self.skip = skip
        self.order = order(schedule, epoch)
        self.end = schedule.steps if end is None else end

    def __len__(self) -> int:
        return self.end - self.skip

    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any]]:
        step = index + self.skip
        indices = self.order[step * self.batch : (step + 1) * self.batch]
        return (self.draw(indices, np.random.default_rng((*self.key, step))),)
