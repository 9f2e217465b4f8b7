"""The page of the results, docs/results.md, and its figures, of the files that `results.py run` wrote."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from protocols import Plan, Protocol, Row
from verdicts import OPEN, RULES, Run, Runs, Verdict, figure, label, mean

from training.recipe import Recipe

Found = dict[str, dict[str, Any]]  # what was kept of a row, by its key

COLOURS = ("#2a6f97", "#e07a3f", "#3d8b5f", "#8d99a6")
FIGURES = {"distances": "Distances along training", "balance": "The error, gamma and the active latents along training"}
SETS = ("REC", "GEN-1", "GEN-2", "GEN-2, scalar", "GEN-2, per-dimension", "Gaussian", "GMM")
HEAD = """\
# Results

What the paper's rows come to in shorter protocols, and which of its claims that decides. `python benchmarks/results.py
render` makes this page of the files that `python benchmarks/results.py run` wrote; `benchmarks/results.toml` says what
is run, and how each claim is decided. Of {rows} rows, {here} here. `data/` holds `cifar-10-batches-bin/` as downloaded
and [`celeba64/`](faces.md#how-it-was-made).

What stands under one protocol had the same pictures, schedule and evaluation, and can be compared; what stands under
two cannot. FD is the Frechet distance of the named extractor's features, not a FID. The paper's own figures are FID, of
full training: they say what order to expect, and nothing else. A figure with ± is the mean of several seeds with their
sample deviation. The mse, the inactive latents and the variance law are measured on the evaluation's real pictures.
"""


def read(folder: Path, plan: Plan) -> Found:
    """Return what was kept of the plan's rows.

    Raises:
        click.ClickException: a file is of other settings than the plan's, or of no row of it, or two of one protocol
            were measured in different ways.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = {row.key: row for row in plan.rows}
    for key, run in found.items():
        if key not in rows:
            raise click.ClickException(f"{folder / key}.json is of no row of the plan; remove it")
        trained = Recipe.from_dict(run["recipe"]).effective()
        if trained != rows[key].resolved.effective() or _evaluation(run) != _wanted(rows[key].protocol):
            raise click.ClickException(f"{folder / key}.json was made with other settings; remove it and run it again")
    for protocol in plan.protocols:
        ours = [key for key in found if rows[key].protocol == protocol]
        for key in ours[1:]:
            if found[key]["evaluation"] != found[ours[0]]["evaluation"]:
                raise click.ClickException(
                    f"{ours[0]} and {key} were measured in different ways; run one of them again"
                )
    return {row.key: found[row.key] for row in plan.rows if row.key in found}


def _evaluation(run: Run) -> tuple[str, str, int]:
    evaluation = run["evaluation"]
    counts = {each["count"] for each in run["records"] if each["set"] != "REC"}
    return evaluation["extractor"]["name"], evaluation["reference"]["split"], max(counts)


def _wanted(protocol: Protocol) -> tuple[str, str, int]:
    return protocol.extractor, protocol.split, protocol.count


def grouped(plan: Plan, found: Found, protocol: Protocol) -> Runs:
    """Return a protocol's runs by the name of their row."""
    runs = defaultdict(list)
    for row in plan.rows:
        if row.protocol == protocol and row.key in found:
            runs[row.name].append(found[row.key])
    return dict(runs)


def page(plan: Plan, found: Found, figures: Sequence[str]) -> str:
    """Return the page; `figures` are the names of those that were drawn."""
    here = f"{len(found)} {'was' if len(found) == 1 else 'were'} run" if found else "none was run"
    parts = [HEAD.format(rows=len(plan.rows), here=here).rstrip(), *_verdicts(plan, found)]
    for protocol in plan.protocols:
        parts += [f"## {protocol.name}", f"{protocol.departs} Made for {protocol.where}."]
        if runs := grouped(plan, found, protocol):
            parts += _measured(plan, runs, protocol)
            parts += [
                f"![{FIGURES[each]}](results/{_file(protocol, each)})"
                for each in FIGURES
                if _file(protocol, each) in figures
            ]
        parts += _missing(protocol, [row for row in plan.rows if row.protocol == protocol and row.key not in found])
    return "\n\n".join(parts) + "\n"


def decided(plan: Plan, found: Found) -> list[tuple[int, str, Verdict]]:
    """Return the verdicts on each claim, as (claim's index, protocol, verdict): one for each protocol with a run."""
    known = {protocol.name: grouped(plan, found, protocol) for protocol in plan.protocols}
    lines = []
    for at, claim in enumerate(plan.claims):
        here = [name for name in claim.protocols if known[name]]
        lines += [(at, name, RULES[claim.by](known[name], **claim.given)) for name in here]
        lines += [] if here else [(at, "-", Verdict(OPEN, "nothing was run"))]
    return lines


def _verdicts(plan: Plan, found: Found) -> list[str]:
    lines = [
        [f"{at + 1}. {plan.claims[at].says}", name, f"**{verdict.answer}**", verdict.because]
        for at, name, verdict in decided(plan, found)
    ]
    rules = "\n".join(f"{at}. {claim.rule}" for at, claim in enumerate(plan.claims, 1))
    return ["## Verdicts", table(["claim", "protocol", "verdict", "numbers"], lines), "What decides each:", rules]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, without the columns in which nothing stands."""
    full = [at for at in range(len(head)) if not at or any(line[at] for line in lines)]
    kept = [[line[at] for at in full] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in kept)


def _measured(plan: Plan, runs: Runs, protocol: Protocol) -> list[str]:
    """Return what was measured under a protocol: how, and a table of each quantity."""
    rows = {row.name: row for row in reversed(plan.rows) if row.protocol == protocol}
    first = next(iter(runs.values()))[0]
    extractor, reference = first["evaluation"]["extractor"], first["evaluation"]["reference"]
    every = [run for group in runs.values() for run in group]
    stages = " and ".join(f"{stage['steps']:,}" for stage in first["stages"])
    trained, measured = (_minutes([run[part]["seconds"] for run in every]) for part in ("train", "evaluate"))
    how = (
        f"{first['stages'][0]['images']:,} pictures seen; steps of the stages: {stages}. Trained on {_where(every)} in "
        f"{trained} minutes a row, measured in {measured}. Extractor {extractor['name']}, sha256 "
        f"{extractor['digest'][:16]}; {protocol.count:,} samples against {reference['count']:,} of "
        f"{reference['of']:,} {reference['split']} pictures, digest {reference['data'][:16]}."
    )
    head = [first["evaluation"]["metric"], "seeds", *SETS, "mse", "inactive", "variance law", "the paper's FID"]
    facts = (("mse", ".4f"), ("inactive", ".3g"), ("variance_law", ".3f"))
    lines = [
        [
            name,
            str(len(group)),
            *(_cell([figure(run, each) for run in group], ".4g") for each in SETS),
            *(_cell([run["latents"].get(key) for run in group], form) for key, form in facts),
            rows[name].scores,
        ]
        for name, group in runs.items()
    ]
    kid = [
        [name, *(_cell([figure(run, each, "kid") for run in group], ".4f") for each in SETS)]
        for name, group in runs.items()
    ]
    parts = [how, table(head, lines), table(["KID", *SETS], kid)]
    if any(line[-1] for line in lines):
        parts.append("The paper's columns are REC / GEN-1 / GEN-2, and REC / Gaussian / GMM of deterministic rows.")
    return parts


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return mean(known, form) if known else ""


def _minutes(seconds: Sequence[float]) -> str:
    middle = statistics.median(seconds) / 60
    return f"{middle:.0f}" if middle >= 10 else f"{middle:.2g}"


def _where(runs: Sequence[Run]) -> str:
    places = [f"{run['train']['device']} ({run['train']['backend']})" for run in runs]
    return ", ".join(dict.fromkeys(places))


def _missing(protocol: Protocol, rows: Sequence[Row]) -> list[str]:
    """Return which rows have no file, as the ends of their keys, and the command that makes them."""
    if not rows:
        return []
    ends = ", ".join(row.key.removeprefix(f"{protocol.name}-") for row in rows)
    return [f"Not run here: {ends}. All of them, or one by `--only {rows[0].key}`:", f"    {protocol.command}"]


def draw(folder: Path, plan: Plan, found: Found) -> list[str]:
    """Draw what there is of each protocol's rows with snapshots; return the files' names.

    PROTOCOL-along-distances.png: the distances of reconstructions and samples along training (figure 2 is the paper's).
    PROTOCOL-along-balance.png: the error, gamma and the active latents along it.
    """
    names = []
    for protocol in plan.protocols:
        shown = [row for row in plan.rows if row.protocol == protocol and row.snapshots and row.key in found]
        if shown:
            runs = {row.name: found[row.key] for row in shown}
            for what, drawn in (("distances", _distances), ("balance", _balance)):
                names.append(_file(protocol, what))
                drawn(folder / names[-1], runs)
    return names


def _file(protocol: Protocol, what: str) -> str:
    return f"{protocol.name}-along-{what}.png"


def _distances(path: Path, runs: Mapping[str, Run]) -> None:
    curves: dict[str, list[tuple[str, list[tuple[int, float]]]]] = {"REC": [], "GEN-1": []}
    for title, those in curves.items():
        for name, run in runs.items():
            records = [each for each in run["records"] if label(each) == title and each["value"] is not None]
            last = run["final"]["epoch"]
            points = sorted({each.get("epoch", last): each["value"] for each in records}.items())
            those += [(name, points)] if points else []
    _plot(path, {f"{title}, FD": each for title, each in curves.items()})


def _balance(path: Path, runs: Mapping[str, Run]) -> None:
    curves = {
        title: [
            (name, [(at["epoch"], at[key]) for at in run["history"]])
            for name, run in runs.items()
            if key in run["final"]
        ]
        for title, key in (("mse", "mse"), ("gamma", "gamma"), ("active latents", "active"))
    }
    _plot(path, curves, logarithmic=("mse", "gamma"))


def _plot(
    path: Path, curves: dict[str, list[tuple[str, list[tuple[int, float]]]]], logarithmic: Sequence[str] = ()
) -> None:
    """Plot curves over the epochs of stage 1, a panel each title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3.3 * len(curves), 3), dpi=80, layout="constrained")
    for axis, (title, each) in zip(drawn.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for colour, (name, points) in zip(COLOURS, each, strict=False):
            axis.plot(*np.transpose(points), marker="o", markersize=3, color=colour, label=name)
        axis.set(title=title, xlabel="epoch", yscale="log" if title in logarithmic else "linear")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        if each:
            axis.legend(frameon=False)
    canvas: Any = FigureCanvasAgg(drawn)  # whose methods have no types
    canvas.print_png(path, metadata={"Software": None})
