"""Compare runs in one document: a row a run, and in each column one protocol. Nothing here needs Keras."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import DataError, RunError
from training.evaluation.report import protocol, table
from training.record.documents import Documents
from training.types import Record

Column = tuple[str, str]  # the metric, and the set with its latent normalisation

# The quantities of a record of pictures: title, key, format, and which of several values is the best, if any is.
_QUANTITIES: tuple[tuple[str, str, str, Callable[[Iterable[float]], float] | None], ...] = (
    ("{metric}", "value", ".4g", min),
    ("KID ({name})", "kid", ".5f", min),
    ("Precision ({name})", "precision", ".3f", max),
    ("Recall ({name})", "recall", ".3f", max),
    ("Copying ({name})", "copying", ".2f", None),
    ("Copying (pixels)", "copying_pixels", ".2f", None),
)
LATENTS: Column = ("latents", "latents")


@dataclass(frozen=True)
class Measured:
    """A run or a bundle with its measurements.

    Attributes:
        name: The name of the run directory, or that of the bundle's file, with its ending.
        recipe: The recipe's values as JSON, as another version may have written it.
        records: The measurements.
    """

    name: str
    recipe: Record
    records: list[Record]

    def document(self) -> Record:
        """Return the content of a file of `evaluate-vae --json`, which `read` takes."""
        return {"name": self.name, "recipe": self.recipe, "records": self.records}


def read(path: Path) -> Measured:
    """Return the measurements of a run directory, or of a file that --json wrote.

    Raises:
        RunError: the directory is not a run, or nothing was measured of it.
        DataError: evaluate-vae did not write the file.
    """
    if path.is_dir():
        run = Documents(path)
        records = [record for record in run.metrics if _ours(record)]
        if not records:
            raise RunError(f"nothing was measured of {path} yet; evaluate-vae {path} does")
        return Measured(path.resolve().name, run.config["recipe"], records)
    try:
        document = json.loads(path.read_text())
        records = [record for record in document["records"] if _ours(record)]
        if records:
            return Measured(str(document["name"]), dict(document["recipe"]), records)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f"{path} is neither a run directory nor a file that evaluate-vae --json wrote")


def _ours(record: Any) -> bool:
    """Tell whether evaluate-vae wrote a record; a run's metrics.json may hold others."""
    needed = {"metric", "count", "reference"}
    if isinstance(record, dict) and record.get("metric") != "latents":
        needed |= {"set", "value", "seed", "extractor"}
    return isinstance(record, dict) and needed <= record.keys()


def compare(measured: list[Measured]) -> str:
    """Return the measurements side by side as Markdown, the best of every column in bold.

    Raises:
        DataError: a column would compare values of different protocols.
    """
    runs = {_name(index, measured): each for index, each in enumerate(measured)}
    columns = dict.fromkeys(_column(record) for run in runs.values() for record in run.records if "epoch" not in record)
    picked = {column: _pick(column, runs) for column in columns}
    parts = [_recipes(runs, picked.pop(LATENTS, {}))]
    for metric in dict.fromkeys(metric for metric, _ in picked):
        sets = {label: records for (each, label), records in picked.items() if each == metric}
        name = next(record["extractor"]["name"] for records in sets.values() for record in records.values())
        for title, key, form, best in _QUANTITIES:
            cells = [_best(_values(runs, records, key), form, best) for records in sets.values()]
            if any(cell != "-" for column in cells for cell in column):
                rows = zip(runs, *cells, strict=True)
                parts.append(table([title.format(metric=metric, name=name), *sets], rows))
    shown = (record for records in picked.values() for record in records.values())
    return "\n\n".join([*parts, *dict.fromkeys(map(protocol, shown))]) + "\n"


def _name(index: int, measured: list[Measured]) -> str:
    """Return a run's name, numbered if another run has the same."""
    name = measured[index].name
    same = [at for at, each in enumerate(measured) if each.name == name]
    return name if len(same) == 1 else f"{name} ({same.index(index) + 1})"


def _column(record: Record) -> Column:
    if record["metric"] == "latents":
        return LATENTS
    mode = record.get("normalisation", "none")
    label = record["set"] + (f", {mode}" if mode != "none" else "") + (", noise" if "latent_noise" in record else "")
    label += f", {record['decoder']}" if "decoder" in record else ""
    return record["metric"], label


def _pick(column: Column, runs: dict[str, Measured]) -> dict[str, Record]:
    """Return a column's records, all of one protocol: the one with the most pictures that all runs share."""
    found: dict[str, dict[str, Record]] = {}
    for name, run in runs.items():
        records = [each for each in run.records if "epoch" not in each and _column(each) == column]
        if records:
            # Of the latents, measured with either decoder, the record of stage 1's own comes last and is kept.
            records.sort(key=lambda record: "decoder" not in record)
            found[name] = {json.dumps(_protocol(record), sort_keys=True): record for record in records}
    (first, theirs), *others = found.items()
    shared = [key for key in theirs if all(key in records for _, records in others)]
    if not shared:
        other, ours = next((name, records) for name, records in others if not theirs.keys() & records.keys())
        one, two = (_protocol(list(records.values())[-1]) for records in (theirs, ours))
        apart = next(key for key in one if one[key] != two[key])
        raise DataError(
            f"{' '.join(dict.fromkeys(column))} was measured in different ways: {apart} is {one[apart]} in {first} and "
            f"{two[apart]} in {other}; measure them alike, or compare them apart"
        )
    best = max(shared, key=lambda key: theirs[key]["count"])
    return {name: records[best] for name, records in found.items()}


def _protocol(record: Record) -> Record:
    reference = {f"the reference's {key}": value for key, value in record["reference"].items()}
    extractor = {f"the extractor's {key}": value for key, value in record.get("extractor", {}).items()}
    return {**extractor, **reference, "the count": record["count"], "the seed": record.get("seed")}


def _values(runs: dict[str, Measured], records: dict[str, Record], key: str) -> list[float | None]:
    return [records.get(name, {}).get(key) for name in runs]


def _best(values: list[float | None], form: str, best: Callable[[Iterable[float]], float] | None = None) -> list[str]:
    """Return a column's cells, with the best value in bold and a dash for an unknown one."""
    known = [value for value in values if value is not None]
    winner = best(known) if best and len(known) > 1 else None
    cells = ["-" if value is None else format(value, form) for value in values]
    return [
        f"**{cell}**" if value is not None and value == winner else cell
        for value, cell in zip(values, cells, strict=True)
    ]


def _recipes(runs: dict[str, Measured], latents: dict[str, Record]) -> str:
    """Return the table of the runs: main settings, and facts about the latents."""
    recipes = [run.recipe for run in runs.values()]
    own = {name: record for name, record in latents.items() if "decoder" not in record}  # a sharpened one has another
    columns = {
        "run": list(runs),
        **{title: [_setting(recipe, key) for recipe in recipes] for title, key in _SETTINGS.items()},
        "mse": _best(_values(runs, own, "mse"), ".5f", min),
        "inactive": _best(_values(runs, latents, "inactive"), "d"),
        "variance law": _best(_values(runs, latents, "variance_law"), ".4f"),
    }
    return table(list(columns), zip(*columns.values(), strict=True))


_SETTINGS = {
    "recipe": "name",
    "first stage": "first_stage",
    "balance": "balance",
    "epochs": "epochs",
    "of stage 2": "epochs2",
}


def _setting(recipe: Record, key: str) -> str:
    if key == "balance" and recipe.get("first_stage", "vae") != "vae":
        return "-"  # there is no KL divergence to balance
    return str(recipe.get(key, "-"))
