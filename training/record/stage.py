"""How long a stage trains, how far it is, and who follows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from training.types import Record


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains.

    Attributes:
        stage: 1 or 2.
        items: Pictures, or latents, in an epoch.
        epochs: Passes over the items.
        batch: Items a minibatch; all of them if there are fewer.
        lr: Learning rate at the start.
        halve_every: Epochs between two halvings of the learning rate.
        seed: Of the order of the items, and of what is drawn with them.
    """

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
        """Minibatches an epoch. Items left over are skipped: others each epoch."""
        return self.items // self.size


@dataclass(frozen=True)
class Position:
    """How far a stage's training is.

    Attributes:
        epoch: Finished epochs.
        step: Finished minibatches of the next one.
        sums: Sums over these minibatches of what was logged, by name.
        seconds: Time that these minibatches took.
    """

    epoch: int = 0
    step: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def after(self, steps: int, means: Mapping[str, float], seconds: float) -> Position:
        """Return the position `steps` minibatches later, given the means of what they logged."""
        sums = {name: self.sums.get(name, 0.0) + mean * steps for name, mean in means.items()}
        return replace(self, step=self.step + steps, sums=sums, seconds=self.seconds + seconds)

    def to_json(self) -> bytes:
        """Return the position as `from_json` takes it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Position:
        """Return the position that `to_json` gave."""
        return cls(**json.loads(text))


class Observer(Protocol):
    """Follows training: `step` is called after every minibatch, `epoch` after every epoch."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: Record) -> None: ...


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.step(schedule, epoch, images, logs)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        for observer in self.observers:
            observer.epoch(schedule, record)
