"""How long a stage trains, how far it is, and who follows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from training.recipe import Recipe
from training.types import Record


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains.

    Attributes:
        stage: 1 or 2; 3 is sharpening.
        items: Pictures, or latents, in an epoch.
        epochs: How many there are.
        batch: Items a minibatch; all of them if there are fewer.
        lr: Learning rate at the start.
        halve_every: Epochs between two halvings of the learning rate.
        seed: Of the order of the items, and of what is drawn with them.
        epoch_steps: Minibatches in an epoch, which go on in the order of the last; 0 makes it one pass over the items.
        warm_up: Minibatches over which the learning rate rises, linearly.
        momentum: Adam's beta_1.
        balance: How the KL divergence is balanced meanwhile, where there is one.
    """

    stage: int
    items: int
    epochs: int
    batch: int
    lr: float
    halve_every: int
    seed: int
    epoch_steps: int = 0
    warm_up: int = 0
    momentum: float = 0.9
    balance: str = "computed"

    @property
    def size(self) -> int:
        """Items a minibatch."""
        return min(self.batch, self.items)

    @property
    def steps(self) -> int:
        """Minibatches an epoch. Items left over after a pass are skipped: others each epoch."""
        return self.epoch_steps or self.items // self.size

    @property
    def images(self) -> int:
        """Items seen in an epoch."""
        return self.steps * self.size

    def rate(self, epoch: int) -> float:
        """Return the learning rate at an epoch's end; epochs count from 0."""
        warmth = min(1.0, (epoch + 1) * self.steps / self.warm_up) if self.warm_up else 1.0
        return float(self.lr * 0.5 ** (epoch // self.halve_every) * warmth)


def first_schedule(recipe: Recipe, pictures: int) -> Schedule:
    """Return the schedule of stage 1 on so many pictures."""
    epochs = recipe.epochs, recipe.batch, recipe.lr, recipe.halve_every
    return Schedule(1, pictures, *epochs, recipe.seed, recipe.epoch_steps, recipe.warm_up, balance=recipe.balance)


def second_schedule(recipe: Recipe, latents: int) -> Schedule:
    """Return the schedule of stage 2 on so many latents."""
    epochs = recipe.epochs2, recipe.batch2 or recipe.batch, recipe.lr2, recipe.halve_every2
    return Schedule(2, latents, *epochs, recipe.seed, recipe.epoch_steps2, balance=recipe.balance2)


def latent_count(recipe: Recipe, pictures: int) -> int:
    """Return how many latents so many pictures have for stage 2: mirror images have theirs too."""
    return pictures * (2 if recipe.flip else 1)


def third_schedule(recipe: Recipe, pictures: int) -> Schedule:
    """Return the schedule of sharpening on so many pictures."""
    epochs = recipe.epochs3, recipe.batch3 or recipe.batch, recipe.lr3, recipe.halve_every3
    # Where two networks train against each other, old gradients mislead.
    return Schedule(3, pictures, *epochs, recipe.seed, recipe.epoch_steps3, momentum=0.5)


def setting_of(stage: int, name: str) -> str:
    """Return the name of a stage's setting: lr, lr2, lr3."""
    return name if stage == 1 else f"{name}{stage}"


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
    """Follows training: `step` is called after every minibatch, `epoch` after every epoch, `note` to say something."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: Record) -> None: ...

    def note(self, text: str) -> None: ...


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

    def note(self, text: str) -> None:
        for observer in self.observers:
            observer.note(text)
