"""How claims are decided by what was measured: each rule says holds, does not hold or not decided, with its numbers.

A rule is given the runs of one protocol, which alone can be compared: by the name of their row, one for each seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided here"

Run = Mapping[str, Any]  # what results.py wrote of one row
Runs = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Verdict:
    """What came of a claim.

    Attributes:
        answer: HOLDS, FAILS or OPEN.
        because: The numbers.
    """

    answer: str
    because: str


def label(record: Mapping[str, Any]) -> str:
    """Return how a set of pictures is called: GEN-2, or GEN-2, scalar."""
    mode = record.get("normalisation", "none")
    return f"{record['set']}, {mode}" if mode != "none" else str(record["set"])


def figure(run: Run, wanted: str, key: str = "value") -> float | None:
    """Return a figure of a run's set of pictures after training; None where it was not measured."""
    found = (each.get(key) for each in run["records"] if "epoch" not in each and label(each) == wanted)
    value = next(found, None)
    return None if value is None else float(value)


def figures(runs: Runs, row: str, wanted: str) -> list[float]:
    """Return a row's distances, one for each seed that has one."""
    found = (figure(run, wanted) for run in runs.get(row, ()))
    return [value for value in found if value is not None]


def mean(values: Sequence[float], form: str = ".4g") -> str:
    """Return a mean in words, with the sample deviation of several values."""
    middle = format(statistics.fmean(values), form)
    return f"{middle} ± {statistics.stdev(values):.2g}" if len(values) > 1 else middle


def lower(runs: Runs, ours: Sequence[str], theirs: Sequence[str]) -> Verdict:
    """Decide whether our row's distances are lower than theirs: each a row and the label of its set."""
    here, there = figures(runs, *ours), figures(runs, *theirs)
    if not here or not there:
        return Verdict(OPEN, _missing(runs, {ours[0]: here, theirs[0]: there}))
    gap = statistics.fmean(here) - statistics.fmean(there)
    said = f"{_seeds(here)} against {_seeds(there)}"
    deviations = [_deviation(runs, values) for values in (here, there)]
    if None in deviations:
        return Verdict(OPEN, f"{said}; no row has two seeds to tell how far they vary")
    margin = sum(each for each in deviations if each is not None)
    said += f": {gap:+.2g}, where more than {margin:.2g} decides"
    return Verdict(OPEN if abs(gap) <= margin else HOLDS if gap < 0 else FAILS, said)


def paired(runs: Runs, rows: Sequence[str], ours: str, theirs: str) -> Verdict:
    """Decide whether one set's distance is below another's in each run."""
    pairs = [(figure(run, ours), figure(run, theirs)) for row in rows for run in runs.get(row, ())]
    gaps = [one - other for one, other in pairs if one is not None and other is not None]
    if len(gaps) < 2:
        return Verdict(OPEN, f"it takes two runs, and there {'is one' if gaps else 'is none'}")
    below, above = sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps)
    said = f"below in {below} of {len(gaps)} runs; the difference is {mean(gaps, '.2g')}"
    return Verdict(HOLDS if below == len(gaps) else FAILS if above == len(gaps) else OPEN, said)


def unordered(runs: Runs, rows: Sequence[str], label: str, below: float, above: float) -> Verdict:
    """Decide whether the order of the rows' errors is another than that of their distances."""
    known = {row: figures(runs, row, label) for row in rows}
    here = [row for row in rows if known[row]]
    if len(here) < 4:
        return Verdict(OPEN, f"it takes four rows; run here: {len(here)}")
    errors = {row: statistics.fmean(run["latents"]["mse"] for run in runs[row]) for row in here}
    distances = {row: statistics.fmean(known[row]) for row in here}
    best, nearest = (min(here, key=each.__getitem__) for each in (errors, distances))
    ranks = [_ranks([each[row] for row in here]) for each in (errors, distances)]
    if any(len(set(each)) == 1 for each in ranks):
        return Verdict(OPEN, "all rows are alike")
    rho = statistics.correlation(*ranks)
    said = (
        f"{rho:+.2f} over {len(here)} rows; the lowest error, {errors[best]:.4f}, is of {best} with a distance of "
        f"{distances[best]:.4g}, and the lowest distance, {distances[nearest]:.4g}, of {nearest} with an error of "
        f"{errors[nearest]:.4f}"
    )
    rounded = round(rho, 9)  # .9 by way of square roots need not be .9
    return Verdict(HOLDS if rounded <= below else FAILS if rounded >= above else OPEN, said)


def falling(runs: Runs, rows: Sequence[str]) -> Verdict:
    """Decide whether fewer latents are inactive at higher learning rates."""
    here = sorted((row for row in rows if runs.get(row)), key=lambda row: float(runs[row][0]["recipe"]["lr"]))
    if len(here) < 3:
        return Verdict(OPEN, f"it takes three rates; run here: {len(here)}")
    counts = [statistics.fmean(run["latents"]["inactive"] for run in runs[row]) for row in here]
    said = ", ".join(
        f"{count:.3g} at {runs[row][0]['recipe']['lr']:g}" for row, count in zip(here, counts, strict=True)
    )
    if counts[-1] > counts[0]:
        return Verdict(FAILS, said)
    never = all(after <= before for before, after in pairwise(counts))
    return Verdict(HOLDS if never and counts[-1] < counts[0] else OPEN, said)


RULES: dict[str, Callable[..., Verdict]] = {
    "lower": lower,
    "paired": paired,
    "unordered": unordered,
    "falling": falling,
}


def _deviation(runs: Runs, values: list[float]) -> float | None:
    """Return the sample deviation of a row's distances; of a single one, the largest that any row has."""
    if len(values) > 1:
        return statistics.stdev(values)
    labels = {label(each) for group in runs.values() for run in group for each in run["records"]}
    several = [found for row in runs for each in labels if len(found := figures(runs, row, each)) > 1]
    return max((statistics.stdev(each) for each in several), default=None)


def _seeds(values: list[float]) -> str:
    return f"{mean(values)} ({len(values)} seed{'s' if len(values) > 1 else ''})"


def _missing(runs: Runs, found: Mapping[str, list[float]]) -> str:
    gone = [row for row, values in found.items() if not values]
    return " and ".join(f"{row} was not {'measured so' if row in runs else 'run'}" for row in gone)


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the values' ranks; equal ones share their mean rank."""
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]
