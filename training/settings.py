"""What is known of a recipe's setting: its unit, its effect, the values that it takes, and when it counts.

One source for the checks, for `--set`'s refusals, and for docs/settings.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# When a setting has an effect, in words and as a test of the recipe.
Counts = tuple[str, Callable[[Any], bool]]
ALWAYS: Counts = ("", lambda recipe: True)

GROUPS = {
    "pictures": "Pictures",
    "first": "Stage 1: networks",
    "balance": "The balance, of stage 1 and of stage 2",
    "deterministic": "A deterministic first stage",
    "priors": "Priors, and stage 2's networks",
    "training": "Training",
    "sharpening": "Sharpening, after both stages: ours, and no part of the paper",
    "kept": "What is kept",
}

INTRODUCTION = """# Every setting

    train-vae --data photos/ --out runs/mine --set side=32 --set batch=64
    train-vae --recipe cifar10 --dry-run

`--set KEY=VALUE` changes a setting of a recipe, or decides one that is otherwise chosen for your pictures and machine.
`--dry-run` prints the values of a recipe, and a run keeps its own in config.json. The defaults here are those of
`cifar10`, the paper's recipe for CIFAR-10, which keeps snapshots besides. It is an error to set what nothing else of
the recipe uses.

*This page is made by `train-vae --list-settings > docs/settings.md`.*

"""


@dataclass(frozen=True)
class Setting:
    """Facts about one setting.

    Attributes:
        group: A key of GROUPS.
        unit: Of its value; "" where it has none.
        effect: What it does, a sentence without its full stop.
        choices: The words that it takes; empty where it takes a number.
        least: The least value. Of 0 exclusively, unless `zero`.
        zero: Whether it may be 0.
        below_one: Whether it has to be below 1.
        counts: When it has an effect.
    """

    group: str
    unit: str
    effect: str
    choices: tuple[str, ...] = ()
    zero: bool = False
    below_one: bool = False
    counts: Counts = ALWAYS


def setting(default: Any, group: str, unit: str, effect: str, **more: Any) -> Any:
    """Return a dataclass field with a default, described as Setting's attributes say."""
    return field(default=default, metadata={"setting": Setting(group, unit, effect, **more)})


def settings(recipe: Any) -> dict[str, Setting]:
    """Return the described settings of a recipe, or of its class, by name."""
    fields = dataclasses.fields(recipe)
    return {each.name: each.metadata["setting"] for each in fields if "setting" in each.metadata}


def text(value: Any) -> str:
    """Return a setting's value as --set takes it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def page(recipe: Any) -> str:
    """Return docs/settings.md: all settings, with the recipe's values as the defaults."""
    parts = []
    for group, title in GROUPS.items():
        rows = ["| setting | unit | default | what it does |", "|---|---|---|---|"]
        for name, each in settings(recipe).items():
            if each.group == group:
                words = f" ({', '.join(f'`{choice}`' for choice in each.choices)})" if each.choices else ""
                counts = f". It counts with {each.counts[0]}" if each.counts[0] else ""
                value = text(getattr(recipe, name))
                rows.append(f"| `{name}` | {each.unit} | `{value}` | {each.effect}{words}{counts} |")
        parts.append(f"## {title}\n\n" + "\n".join(rows))
    return INTRODUCTION + "\n\n".join(parts) + "\n"
