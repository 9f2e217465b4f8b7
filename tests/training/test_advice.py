"""What is wrong with a run is said by rule: each is brought about in the records that it reads."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from training.recipes import recipe
from training.record import advice
from training.record.advice import AT_END, Rule
from training.record.stage import Schedule

LONG = Schedule(1, 3200, 20, 32, 1e-3, 5, seed=0)
GOOD = {"stage": 1, "mse": 0.01, "kl": 50.0, "gamma": 0.11, "active": 60, "latents": 64, "variance_law": 0.95}


def records(epochs: int = 20, **changes: Any) -> list[dict[str, Any]]:
    """Records of a stage; a change is a value, or one for each epoch, None where it was not recorded."""
    made = []
    for epoch in range(epochs):
        each = {key: value[epoch] if isinstance(value, list) else value for key, value in changes.items()}
        record = {**GOOD, "epoch": epoch + 1, "lr": LONG.rate(epoch), **each}
        made.append({key: value for key, value in record.items() if value is not None})
    return made


def test_a_good_run_is_left_in_peace() -> None:
    falling = [0.03 * 0.7**epoch + 0.01 for epoch in range(20)]
    roots = [1.1 * error**0.5 for error in falling]
    good = records(mse=falling, gamma=roots, validation_mse=[error * 1.2 for error in falling])
    assert [rule(LONG, good) for rule in AT_END] == [""] * len(AT_END)
    assert [rule(LONG, good[:1]) for rule in AT_END] == [""] * len(AT_END)


@pytest.mark.parametrize(
    ("rule", "seen", "said", "remedy"),
    [
        (
            advice.balance_behind,
            {"gamma": 0.2},
            "gamma 0.2 is 2.0 times the root of the error",
            "a lower balance_momentum",
        ),
        (
            advice.kl_exploded,
            {"kl": [860_000.0] + [120.0] * 19},
            "exploded in epoch 1, to 860,000 nats on average",
            "a longer warm_up or a lower lr, or another seed",
        ),
        (
            advice.kl_exploded,
            {"kl": [306.0, 22.0] + [40.0] * 18},  # seen once; the error stayed a third above other seeds'
            "exploded in epoch 1, to 306 nats on average",
            "a longer warm_up or a lower lr, or another seed",
        ),
        (advice.few_active, {"active": 7}, "only 7 of 64 latents are active", "kl_weight"),
        (advice.law_broken, {"variance_law": 0.4}, "total variance is 0.40 where 1 is expected", "raise kl_weight"),
        (advice.law_broken, {"variance_law": 2.0}, "total variance is 2.00", "lower lr"),
        (
            advice.by_heart,
            {"validation_mse": [0.02 - 0.001 * min(epoch, 9) + 0.001 * max(0, epoch - 9) for epoch in range(20)]},
            "91% above its lowest, of epoch 10: pictures are learned by heart",
            "more pictures",
        ),
        (
            advice.by_heart,  # held back from epoch 11 on
            {"validation_mse": [None] * 10 + [0.02, 0.01, *[0.03] * 8]},
            "200% above its lowest, of epoch 12",
            "more pictures",
        ),
        (
            advice.slowed_too_soon,
            {"mse": [0.1 * 0.9**epoch for epoch in range(20)]},
            "still fell by 41% in the last quarter",
            "raise halve_every and epochs, or, without a recipe, --minutes",
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_setting_to_change(
    rule: Rule, seen: dict[str, Any], said: str, remedy: str
) -> None:
    text = rule(LONG, records(**seen))
    assert said in text
    assert remedy in text
    assert "\n" not in text


def test_an_explosion_is_said_at_once_and_once() -> None:
    """After the first of 20 epochs; other rules wait."""
    seen, notes = records(kl=[860_000.0] + [120.0] * 19, gamma=0.2), list[str]()

    class Notes:
        def step(self, *_: Any) -> None: ...

        def epoch(self, *_: Any) -> None: ...

        def note(self, text: str) -> None:
            notes.append(text)

    class Kept:
        done = 0

        def history(self) -> list[dict[str, Any]]:
            return seen[: self.done]

    run: Any = Kept()
    adviser = advice.Adviser(run, Notes())
    for done, expected in ((1, 1), (2, 1), (12, 2), (13, 2)):
        run.done = done
        adviser.epoch(LONG, seen[done - 1])
        assert len(notes) == expected, notes
    assert "exploded in epoch 1" in notes[0]


def test_smaller_minibatches_are_no_more_steps_where_an_epoch_is_so_many() -> None:
    few = replace(LONG, epochs=3)
    assert advice.few_steps(few, records(3)).endswith("raise epochs, or lower batch (32)")
    assert advice.few_steps(replace(few, epoch_steps=10), records(3)).endswith("make a model; raise epochs")


@pytest.mark.parametrize("policy", ["fixed", "annealed"])
def test_a_gamma_that_is_held_has_nowhere_to_arrive(policy: str) -> None:
    assert advice.balance_behind(replace(LONG, balance=policy), records(gamma=1.0)) == ""


def test_a_learned_gamma_that_is_behind_can_be_computed() -> None:
    text = advice.balance_behind(replace(LONG, stage=2, balance="learned"), records(gamma=0.2))
    assert text.endswith("more steps (raise epochs2), or balance2=computed")


def test_an_annealed_divergence_comes_back_from_where_it_was_free() -> None:
    free = {"kl": [900.0, 600.0, 100.0] + [40.0] * 17}
    assert "exploded" in advice.kl_exploded(LONG, records(**free))
    assert advice.kl_exploded(replace(LONG, balance="annealed"), records(**free)) == ""
    assert "exploded" in advice.kl_exploded(replace(LONG, balance="annealed"), records(kl=[860_000.0] + [120.0] * 19))


def test_at_its_end_a_run_hears_of_every_stage_that_was_short() -> None:
    """Stage 2 has a latent for each mirror image too."""

    settings = ["flip=true", "epochs=10", "batch=10", "epochs2=5", "batch2=10", "epochs3=3", "batch3=10"]
    history = [{**each, "stage": stage} for stage in (1, 2, 3) for each in records(3, gamma=0.1)]
    run: Any = SimpleNamespace(
        recipe=recipe("smoke").set(settings), config={"data": {"count": 1000}}, history=lambda: history
    )
    assert [line[:33] for line in advice.at_end(run)] == ["stage 3: 300 steps are few: train"]
    assert "raise epochs3, or lower batch3 (10)" in "".join(advice.at_end(run))


def test_steps_count_and_not_epochs() -> None:
    short = Schedule(1, 700, 60, 200, 4e-4, 24, seed=0)  # 700 pictures as the recipe faces takes them
    assert advice.few_steps(short, records()).startswith("180 steps are few")
    assert "lower batch (200)" in advice.few_steps(short, records())
    assert advice.few_steps(Schedule(1, 700, 60, 32, 4e-4, 24, seed=0), records()) == ""
