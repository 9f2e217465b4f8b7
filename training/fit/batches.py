"""The order in which an epoch visits the data, as Keras reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt


class Epoch(keras.utils.PyDataset):  # type: ignore[misc]  # Keras ships no types
    """One shuffled pass over `count` items, from minibatch `skip` on, up to `end`.

    The order and every random draw are functions of (seed, epoch, minibatch), so a resumed epoch continues exactly
    as the stopped one would have.

    Args:
        count: Number of items. Those left over after the last full minibatch are skipped: others each epoch.
        batch: Items a minibatch.
        draw: Makes a minibatch of indices and a random generator of its own.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        draw: Callable[[npt.NDArray[np.intp], np.random.Generator], npt.NDArray[Any]],
        seed: int,
        epoch: int,
        skip: int = 0,
        end: int | None = None,
    ) -> None:
        super().__init__()
        self.batch = min(batch, count)
        self.draw = draw
        self.key = (seed, epoch)
        self.skip = skip
        self.order = np.random.default_rng(self.key).permutation(count)
        self.end = count // self.batch if end is None else end

    def __len__(self) -> int:
        return self.end - self.skip

    def __getitem__(self, index: int) -> tuple[npt.NDArray[Any]]:
        step = index + self.skip
        indices = self.order[step * self.batch : (step + 1) * self.batch]
        return (self.draw(indices, np.random.default_rng((*self.key, step))),)
