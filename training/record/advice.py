"""What a run's own records say is wrong with it, each in one line with the setting to change.

The rules compare a record with what theory or experience expects. They are said as training goes on, once each, and
again at its end, where those that have mended themselves are left out; an explosion is not mended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from training.record.run import Run
from training.record.stage import (
    Observer,
    Schedule,
    first_schedule,
    latent_count,
    second_schedule,
    setting_of,
    third_schedule,
)
from training.types import Record

FEW_STEPS = 1000
GAMMA_OVER_ROOT = 1.3  # above which the balance has not arrived at the error
EXPLODED = 1000  # nats a latent, on average over an epoch; a latent that tells much has ten
LEAPT = 3  # nats a latent that are too many
BACK = 0.2  # where a later epoch has this share of them: no training gives up so much of what it learned
FEW_ACTIVE = 0.25  # of the latents
LAW = (0.6, 1.4)  # the variance law's mean total variance; 1 where it holds
RISEN = 1.1  # validation error over its lowest
PATIENCE = 3  # epochs since that lowest
STILL_FALLING = 0.05  # share of the error that went in the last quarter
ALIKE = 0.2  # variance of samples over that of the pictures
BLURRED = 0.6  # reconstructions' error over that of the average picture

Rule = Callable[[Schedule, Sequence[Record]], str]


def few_steps(schedule: Schedule, records: Sequence[Record]) -> str:
    """The whole stage has few steps, however many epochs they are."""
    steps = schedule.steps * schedule.epochs
    if steps >= FEW_STEPS:
        return ""
    # Where an epoch is so many minibatches, smaller ones are no more of them.
    smaller = "" if schedule.epoch_steps else f", or lower {setting_of(schedule.stage, 'batch')} ({schedule.size})"
    return (
        f"{steps:,} steps are few: training counts minibatches, and {FEW_STEPS:,} or more make a model; "
        f"raise {_epochs(schedule)}{smaller}"
    )


def balance_behind(schedule: Schedule, records: Sequence[Record]) -> str:
    """Gamma is far above the root of the error, so the KL divergence weighs more than it should."""
    last = records[-1]
    arrives = {"computed": "a lower balance_momentum", "learned": f"{setting_of(schedule.stage, 'balance')}=computed"}
    if schedule.balance not in arrives or "gamma" not in last or last["gamma"] <= GAMMA_OVER_ROOT * last["mse"] ** 0.5:
        return ""
    times = last["gamma"] / last["mse"] ** 0.5
    return (
        f"gamma {last['gamma']:.2g} is {times:.1f} times the root of the error: the balance has not arrived, and the "
        f"KL divergence weighs too much; more steps (raise {_epochs(schedule)}), or {arrives[schedule.balance]}"
    )


def kl_exploded(schedule: Schedule, records: Sequence[Record]) -> str:
    """A step threw the posteriors far off."""
    worst = max(records, key=lambda record: record.get("kl", 0))
    kl, latents = worst.get("kl", 0), worst.get("latents", 1)
    back = any(later.get("kl", 0) < BACK * kl for later in records if later["epoch"] > worst["epoch"])
    back = back and schedule.balance != "annealed"  # there it is free at first, and comes back as it is weighed
    if kl <= LEAPT * latents or not (back or kl > EXPLODED * latents):
        return ""
    slower = "a longer warm_up or a lower lr" if schedule.stage == 1 else f"a lower {setting_of(schedule.stage, 'lr')}"
    return (
        f"the KL divergence exploded in epoch {worst['epoch']}, to {worst['kl']:,.0f} nats on average, after which "
        f"pictures may stay worse than they need be: train anew with {slower}, or another seed"
    )


def few_active(schedule: Schedule, records: Sequence[Record]) -> str:
    """Most latents are ignored."""
    last = records[-1]
    if schedule.stage == 2 or last.get("active", last["latents"]) >= FEW_ACTIVE * last["latents"]:
        return ""
    return (
        f"only {last['active']} of {last['latents']} latents are active, so pictures can differ in little; "
        "more steps, a lower kl_weight, or a smaller latent_dim"
    )


def law_broken(schedule: Schedule, records: Sequence[Record]) -> str:
    """The aggregate posterior is not the prior's width."""
    law = records[-1]["variance_law"]
    if schedule.stage == 2 or "kl" not in records[-1] or LAW[0] <= law <= LAW[1]:
        return ""
    cure = "raise kl_weight, or gamma where it is held" if law < LAW[0] else "lower lr"
    return f"the latents' total variance is {law:.2f} where 1 is expected (the variance law): {cure}"


def by_heart(schedule: Schedule, records: Sequence[Record]) -> str:
    """The error on held back pictures rises."""
    errors = {record["epoch"]: record["validation_mse"] for record in records if "validation_mse" in record}
    if not errors:
        return ""
    best, (last, error) = min(errors, key=errors.__getitem__), list(errors.items())[-1]
    if error < RISEN * errors[best] or best > last - PATIENCE:
        return ""
    return (
        f"the validation error is {error / errors[best] - 1:.0%} above its lowest, of epoch {best}: pictures are "
        "learned by heart; fewer steps, more pictures, or flip=true"
    )


def slowed_too_soon(schedule: Schedule, records: Sequence[Record]) -> str:
    """The rate was halved to a quarter or less while the error still fell."""
    fell = 1 - records[-1]["mse"] / records[-1 - len(records) // 4]["mse"]
    if len(records) < 8 or records[-1]["lr"] > schedule.lr / 4 or fell < STILL_FALLING:
        return ""
    halve = setting_of(schedule.stage, "halve_every")
    return (
        f"the error still fell by {fell:.0%} in the last quarter, when the rate had been halved already: "
        f"raise {halve} and {_epochs(schedule)}, or, without a recipe, --minutes"
    )


def _epochs(schedule: Schedule) -> str:
    return setting_of(schedule.stage, "epochs")


AT_ONCE: tuple[Rule, ...] = (kl_exploded,)
ALONG: tuple[Rule, ...] = (few_steps, few_active, balance_behind, by_heart, slowed_too_soon)
AT_END: tuple[Rule, ...] = (*AT_ONCE, few_steps, few_active, balance_behind, law_broken, by_heart, slowed_too_soon)
SHARPENING = 3  # a stage to which no rule applies along the way: its error rises as it should
SETTLED = 0.5  # share of a stage after which what is odd has had time to mend


class Adviser:
    """An observer that notes what is wrong as training goes on, each rule once a stage, and passes everything on."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self.run, self.observer = run, observer
        self.said: set[tuple[int, Rule]] = set()

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        self.observer.step(schedule, epoch, images, logs)

    def note(self, text: str) -> None:
        self.observer.note(text)

    def epoch(self, schedule: Schedule, record: Record) -> None:
        self.observer.epoch(schedule, record)
        last = record["epoch"] == schedule.epochs  # at the end everything is said together
        if schedule.stage == SHARPENING or last:
            return
        records = _of(self.run, schedule.stage)
        for rule in AT_ONCE if record["epoch"] < SETTLED * schedule.epochs else (*AT_ONCE, *ALONG):
            if (schedule.stage, rule) not in self.said and (text := rule(schedule, records)):
                self.said.add((schedule.stage, rule))
                self.observer.note(f"stage {schedule.stage}: {text}")


def at_end(run: Run) -> Iterator[str]:
    """Yield what is wrong with a finished run, a line each."""
    recipe, count = run.recipe, run.config["data"]["count"]
    rules = {
        first_schedule(recipe, count): AT_END,
        second_schedule(recipe, latent_count(recipe, count)): AT_END,
        third_schedule(recipe, count): (few_steps,),
    }
    for schedule, those in rules.items():
        if records := _of(run, schedule.stage):
            yield from (f"stage {schedule.stage}: {text}" for rule in those if (text := rule(schedule, records)))


def collapse(run: Run) -> str:
    """Say in which way a finished run's pictures are all alike, or all blurred; "" where they are not."""
    name = run.default_prior
    error, diversity = outcome(run)
    if error > BLURRED:
        much = "little" if error < 1 else "no"
        return (
            f"reconstructions are {much} better than the average picture (error {error:.2f} of the pictures' "
            "variance, where .45 is recognisable)"
        )
    if diversity < ALIKE:
        return f"samples of prior {name} are nearly alike ({diversity:.2f} of the pictures' variance)"
    return ""


def outcome(run: Run) -> tuple[float, float]:
    """Return the error of a finished run's reconstructions, and the diversity of its default prior's samples.

    Both are in units of the pictures' variance, and of the decoder that is exported.
    """
    known = run.diagnostics
    if run.sharpened:
        return known["sharpened"]["error"], known["sharpened"]["diversity"]
    return known["error"], known["diversity"][run.default_prior]


def _of(run: Run, stage: int) -> list[Record]:
    return [record for record in run.history() if record["stage"] == stage]
