"""What the paper's rows come to here: each is trained and measured by the commands, and kept as a JSON file.

python benchmarks/results.py run --data data/ --features efficientnet-lite0.onnx --only cifar10-small
python benchmarks/results.py render

`results.toml` says what the rows are. `run` makes those that have no file yet, and goes on where it was stopped;
`render` makes docs/results.md of the files.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import click
from filelock import FileLock, Timeout
from measure import installed, trainer
from protocols import TOML, Plan, Row, plan
from results_page import draw, page, read

from training.errors import TrainingError
from training.files import replacing, write_json
from training.recipe import Recipe
from training.record.documents import Documents
from training.record.stage import Schedule, first_schedule, latent_count, second_schedule

POINTS = 40  # of a history that are kept
KEPT = ("epoch", "images", "lr", "mse", "kl", "gamma", "active", "latents", "variance_law", "validation_mse")
SHARED = ("metric", "extractor", "reference", "seed", "kid_subsets", "kid_subset", "neighbours")
# As the console scripts begin, which are not there where the package is on PYTHONPATH alone.
START = [sys.executable, "-P", "-c"]
SCRIPTS = {name: f"from balanced_vae.commands import {name} as main; main()" for name in ("train_vae", "evaluate_vae")}

rows_option = click.option("--rows", type=click.Path(path_type=Path, exists=True), default=TOML, help="The TOML file.")
docs_option = click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)


class Stopped(Exception):
    """A signal came, and was passed to the command that ran."""


class Commands:
    """Runs one command after another; SIGINT and SIGTERM are passed to the one that runs, and no other is started."""

    def __init__(self) -> None:
        self.signal = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._told = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def run(self, name: str, words: Sequence[str]) -> None:
        """Run one to its end.

        Raises:
            Stopped: a signal came.
            click.ClickException: it failed.
        """
        if self.signal:
            raise Stopped
        # In a session of its own, so that Ctrl-C comes by us alone: a second signal would end it before it has saved.
        self._child, self._told = subprocess.Popen([*START, SCRIPTS[name], *words], start_new_session=True), False
        self._tell()
        code = self._child.wait()
        if self.signal:
            raise Stopped
        if code:
            raise click.ClickException(f"{name.replace('_', '-')} ended with {code}; above it says why")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._tell()

    def _tell(self) -> None:
        if self.signal and self._child and not self._told:
            self._told = True
            self._child.send_signal(self.signal)


class Job:
    """One row's work: its folder, what is done of it, and its two commands.

    Args:
        row: The row.
        commands: Runs them.
        work: The folder of all rows' runs.
        device: What they run on.
    """

    def __init__(self, row: Row, commands: Commands, work: Path, device: str) -> None:
        self.row, self.commands, self.device = row, commands, device
        self.out = work / row.key
        self.measured = work / f"{row.key}.measured.json"
        self._notes = work / f"{row.key}.progress.json"
        self.done: dict[str, Any] = json.loads(self._notes.read_text()) if self._notes.exists() else {}

    def train(self, data: Path, steps: int) -> None:
        """Train the row, unless that is done."""
        more = ["--steps-per-execution", str(steps)] if steps > 1 else []
        shown = self.row.training("", f"runs/{self.row.key}")
        self._part("train_vae", shown, more, self.row.training(f"{data}/", str(self.out)))

    def evaluate(self, data: Path, features: Path) -> None:
        """Measure the row, unless that is done."""
        shown = self.row.evaluation("", f"runs/{self.row.key}", features.name)
        words = self.row.evaluation(f"{data}/", str(self.out), str(features))
        self._part("evaluate_vae", shown, ["--json", str(self.measured)], words)

    def _part(self, name: str, shown: list[str], more: list[str], words: list[str]) -> None:
        """Run a command, and keep what it took in all, with the pauses between left out."""
        command = shlex.join([name.replace("_", "-"), *shown])
        before = self.done.get(name, {})
        if before.get("command") != command:
            before = {}
        if before.get("done"):
            return
        click.echo(f"{self.row.key}: {command}", err=True)
        began, done = time.monotonic(), False
        try:
            self.commands.run(name, [*words, *more])
            done = True
        finally:
            seconds = round(before.get("seconds", 0) + time.monotonic() - began, 1)
            backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
            facts = {"command": command, "seconds": seconds, "backend": backend, "device": self.device, "done": done}
            earlier = self.done if name == "evaluate_vae" else {}  # what is trained anew is measured anew
            self.done = {**earlier, name: facts}
            write_json(self._notes, self.done)

    def result(self) -> dict[str, Any]:
        """Return all that is kept of the row."""
        run, row = Documents(self.out), self.row
        recipe, pictures = Recipe.from_dict(run.config["recipe"]), run.config["data"]["count"]
        records = json.loads(self.measured.read_text())["records"]
        latents = next(each for each in records if each["metric"] == "latents")
        pairs = [each for each in records if each["metric"] != "latents"]
        lines = (self.out / "history.jsonl").read_text().splitlines()
        history = [record for record in map(json.loads, lines) if record["stage"] == 1]
        stages = [first_schedule(recipe, pictures)]
        second = second_schedule(recipe, latent_count(recipe, pictures))
        stages += [second] if "second-stage" in recipe.priors else []
        return {
            "row": {"name": row.name, "protocol": row.protocol.name, "recipe": row.recipe, "seed": row.seed},
            "commands": [self.done[name]["command"] for name in SCRIPTS],
            "date": date.today().isoformat(),
            "train": _facts(self.done["train_vae"]),
            "evaluate": _facts(self.done["evaluate_vae"]),
            "versions": installed(),
            "recipe": recipe.to_dict(),
            "pictures": pictures,
            "stages": [_length(each) for each in stages],
            "evaluation": {key: pairs[0][key] for key in SHARED if key in pairs[0]},
            "latents": {key: value for key, value in latents.items() if key not in ("per_latent", "reference")},
            "records": [{key: value for key, value in each.items() if key not in SHARED} for each in pairs],
            "final": _point(history[-1]),
            "history": [_point(each) for each in thinned(history)],
        }


def _facts(part: dict[str, Any]) -> dict[str, Any]:
    return {key: part[key] for key in ("seconds", "backend", "device")}


def _length(schedule: Schedule) -> dict[str, int]:
    return {"steps": schedule.steps * schedule.epochs, "images": schedule.images * schedule.epochs}


def _point(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in KEPT if key in record}


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a history's first and last records and some between, evenly."""
    step = -(-len(history) // POINTS)
    return [each for at, each in enumerate(history) if at % step == 0 or at == len(history) - 1]


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows of these names, or of the protocols of these names; all without any."""
    known = {each for row in rows for each in (row.key, row.protocol.name)}
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"--only takes a row or a protocol, as docs/results.md has them. Received: {unknown[0]}")
    return [row for row in rows if not names or {row.key, row.protocol.name} & set(names)]


def make(job: Job, file: Path, data: Path, features: Path | None, steps: int) -> str:
    """Do what is left of a row; return what to say of it, or nothing where there is its file."""
    if file.exists():
        return ""
    job.train(data, steps)
    if features is None:
        return f"{job.row.key}: trained; the same command with --features measures it"
    job.evaluate(data, features)
    with replacing(file) as part:
        part.write_text(json.dumps(job.result(), indent=1) + "\n")
    return f"{job.row.key}: {file}"


@click.group()
def main() -> None:
    """Run the paper's rows, and make docs/results.md of what they came to."""


@main.command()
@click.option(
    "--data",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Holds cifar-10-batches-bin/ and celeba64/, the faces at 64x64.",
)
@click.option(
    "--features",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The feature extractor; without one, rows are trained and not measured.",
)
@click.option("--only", multiple=True, metavar="NAME", help="A row, or a protocol's rows (repeatable).")
@click.option("--budget", metavar="MINUTES", type=float, help="Begin no row later than this.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/results"), help="Where the runs are kept.")
@click.option(
    "--steps-per-execution", "steps", metavar="N", type=click.IntRange(min=1), default=1, help="Passed to train-vae."
)
@docs_option
@rows_option
def run(
    data: Path,
    features: Path | None,
    only: tuple[str, ...],
    budget: float | None,
    work: Path,
    steps: int,
    docs: Path,
    rows: Path,
) -> None:
    """Train and measure the rows that have no file in docs/results, in order."""
    wanted = chosen(plan(rows).rows, only)
    if features and (others := sorted({row.protocol.extractor for row in wanted} - {features.stem})):
        raise click.UsageError(f"--features takes {others[0]}.onnx, the protocol's. Received: {features}")
    began, commands, here, failed = time.monotonic(), Commands(), trainer(), []
    work.mkdir(parents=True, exist_ok=True)
    files = {row.key: docs / "results" / f"{row.key}.json" for row in wanted}
    for row in (row for row in wanted if not files[row.key].exists()):
        if budget is not None and time.monotonic() - began >= 60 * budget:
            click.echo(f"{budget:g} minutes are over; the same command goes on with {row.key}", err=True)
            break
        try:
            with FileLock(work / f"{row.key}.lock", timeout=0):
                job = Job(row, commands, work, here)
                said = make(job, files[row.key], data, features, steps)
        except Timeout:
            said = f"{row.key}: another process is at it"
        except Stopped:
            click.echo(f"stopped in {row.key}; the same command goes on from here", err=True)
            sys.exit(128 + commands.signal)
        except (click.ClickException, TrainingError) as error:  # the rows after it are worth as much as before
            said = f"{row.key}: {error}"
            failed.append(row.key)
        if said:
            click.echo(said, err=True)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; the same command tries again")


@main.command()
@docs_option
@rows_option
def render(docs: Path, rows: Path) -> None:
    """Write docs/results.md and its figures, from the files in docs/results."""
    what: Plan = plan(rows)
    found = read(docs / "results", what)
    names = draw(docs / "results", what, found)
    (docs / "results.md").write_text(page(what, found, names))


if __name__ == "__main__":
    main()
