"""A stage's training as it is recorded: how long it goes, where it stands, and who is told of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from training.types import Record


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
class Position:
    """Where a stage's training stands.

    Attributes:
        epoch: The epoch it is in, from 0 on.
        step: Minibatches of that epoch that are done.
        sums: What was logged, by name, summed up over these minibatches.
        seconds: Time they took.
    """

    epoch: int = 0
    step: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def after(self, steps: int, means: Mapping[str, float], seconds: float) -> Position:
        """Return the position some minibatches later, given the means of what they logged."""
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
    """Is told how a stage goes. `step` comes after every minibatch, `epoch` after every epoch."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: Record) -> None: ...


class Observers:
    """Several observers as one; each is told in turn."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.step(schedule, epoch, images, logs)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        for observer in self.observers:
            observer.epoch(schedule, record)
