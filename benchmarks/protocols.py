"""What `results.py` is to run: the protocols, rows and claims of a TOML file, checked."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from training.errors import RecipeError
from training.recipe import Recipe
from training.recipes import RECIPES, recipe

TOML = Path(__file__).with_name("results.toml")
SCORES = r"(?:-|\d[\d.]*\d) / \d[\d.]*\d / \d[\d.]*\d(?:, \d+ inactive)?(?:, mse \.\d+)?"
SAME = {"lr", "priors"}  # settings of a row's own that leave it the paper's row

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Protocol:
    """What rows share, so that their figures can be compared.

    Attributes:
        name: How it is called.
        data: The folder of its pictures, in that of all data.
        settings: Of `train-vae --set`.
        count: Real pictures, and samples of each prior.
        split: The split that the real pictures are from.
        extractor: The name of the feature extractor.
        where: What it is made for.
        variables: Of the environment, before the command.
        departs: How it departs from the paper's, in a sentence.
    """

    name: str
    data: str
    settings: list[str]
    count: int
    split: str
    extractor: str
    where: str
    departs: str
    variables: str = ""

    @property
    def command(self) -> str:
        """The command that makes its rows."""
        words = f"run --data data/ --features {self.extractor}.onnx --only {self.name}"
        return f"{self.variables} python benchmarks/results.py {words}".lstrip()


@dataclass(frozen=True)
class Row:
    """One run: a named recipe under a protocol, with a seed. Rows of one name and protocol differ in the seed alone.

    Attributes:
        name: How it is called in its protocol.
        recipe: The named recipe.
        protocol: What it shares with others.
        seed: Of the training.
        settings: Its own, which override those of the protocol.
        snapshots: Whether its snapshots are measured, and its training is drawn.
    """

    name: str
    recipe: str
    protocol: Protocol
    seed: int
    settings: list[str]
    snapshots: bool = False

    @property
    def key(self) -> str:
        """The row's name among all rows: that of its file."""
        return f"{self.protocol.name}-{self.name}-{self.seed}"

    @property
    def assignments(self) -> list[str]:
        """What `--set` is given."""
        chosen = [*self.protocol.settings, *self.settings, f"seed={self.seed}"]
        return list({each.partition("=")[0]: each for each in chosen}.values())

    @property
    def resolved(self) -> Recipe:
        """The recipe with every setting."""
        return recipe(self.recipe).set(self.assignments)

    @property
    def scores(self) -> str:
        """What the paper reports of the recipe, as its docstring has it; "" where the row is none of the paper's."""
        if {each.partition("=")[0] for each in self.settings} - SAME:
            return ""
        found = re.search(SCORES, RECIPES[self.recipe].__doc__ or "")
        return found[0] if found else ""

    def training(self, data: str, out: str) -> list[str]:
        """Return the words of `train-vae`."""
        settings = [word for each in self.assignments for word in ("--set", each)]
        return ["--recipe", self.recipe, "--data", f"{data}{self.protocol.data}", "--out", out, *settings]

    def evaluation(self, data: str, run: str, features: str) -> list[str]:
        """Return the words of `evaluate-vae`."""
        how = ["--count", str(self.protocol.count), "--split", self.protocol.split]
        along = ["--snapshots"] if self.snapshots else []
        return [run, "--data", f"{data}{self.protocol.data}", "--features", features, *how, *along]


@dataclass(frozen=True)
class Claim:
    """What the paper says, and how it is decided here.

    Attributes:
        says: The claim.
        rule: How it is decided, in words.
        by: The name of the rule in `verdicts.RULES`.
        protocols: Names of those in which it is decided, each for itself.
        given: What the rule takes.
    """

    says: str
    rule: str
    by: str
    protocols: list[str]
    given: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All that there is to run and to decide, most valuable first."""

    protocols: list[Protocol]
    rows: list[Row]
    claims: list[Claim]


def plan(path: Path) -> Plan:
    """Return what a TOML file says.

    Raises:
        click.ClickException: it cannot be read, or a row cannot be run.
    """
    try:
        said = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot read {path}: {error}") from None
    protocols = {name: _made(Protocol, path, {"name": name, **each}) for name, each in said["protocols"].items()}
    rows = [_row(path, protocols, each) for each in said["rows"]]
    keys = [row.key for row in rows]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise click.ClickException(f"{path} should have each row once. Received twice: {', '.join(twice)}")
    claims = [_made(Claim, path, each) for each in said["claims"]]
    if unknown := {name for claim in claims for name in claim.protocols} - protocols.keys():
        raise click.ClickException(f"{path}: a claim names no protocol of the file. Received: {', '.join(unknown)}")
    return Plan(list(protocols.values()), rows, claims)


def _row(path: Path, protocols: dict[str, Protocol], said: dict[str, Any]) -> Row:
    name = said.get("protocol")
    if name not in protocols:
        raise click.ClickException(f"{path}: a row takes one of {', '.join(protocols)}. Received: {name!r}")
    row = _made(Row, path, {"settings": [], **said, "protocol": protocols[name]})
    try:
        _ = row.resolved
    except RecipeError as error:
        raise click.ClickException(f"{path}, row {row.key}: {error}") from None
    return row


def _made(kind: type[Kind], path: Path, said: dict[str, Any]) -> Kind:
    try:
        return kind(**said)
    except TypeError:
        known = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # all kinds are dataclasses
        wrong = ", ".join(sorted(known ^ said.keys()))
        raise click.ClickException(
            f"{path}: a {kind.__name__.lower()} takes {', '.join(sorted(known))}. Received, or missing: {wrong}"
        ) from None
