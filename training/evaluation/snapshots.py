"""Snapshots of a run along its training, and figure 2 of the paper, which shows their records."""

from __future__ import annotations

import re
from pathlib import Path

from training.errors import RunError
from training.record import plots
from training.record.run import Run
from training.types import Record


def found(run: Run) -> list[tuple[int, Path]]:
    """Return (epochs trained, file) of every snapshot, in order.

    Raises:
        RunError: there is none.
    """
    paths = (run.path / "snapshots").glob("stage1-*.keras")
    matches = ((re.fullmatch(r"stage1-(\d+)\.keras", path.name), path) for path in paths)
    here = sorted((int(match[1]), path) for match, path in matches if match)
    if not here:
        raise RunError(f"{run.path} has no snapshots; train-vae --set snapshot_every=N keeps them")
    return here


def figure2(run: Run, records: list[Record]) -> Path:
    """Plot the Frechet distance of REC and GEN-1 over the epochs to figures/figure2.png, and return its path.

    Args:
        run: The run. A record without an epoch is one of its last epoch.
        records: Records of one protocol.
    """
    curves = {name: _curve(run, records, name) for name in ("REC", "GEN-1")}
    path = run.path / "figures" / "figure2.png"
    plots.distances(path, next(record["metric"] for record in records if "value" in record), curves)
    return path


def _curve(run: Run, records: list[Record], name: str) -> dict[int, float]:
    """Return a set's distances by epoch."""
    ours = (record for record in records if record.get("set") == name and "decoder" not in record)
    return dict(sorted((record.get("epoch", run.recipe.epochs), record["value"]) for record in ours))
