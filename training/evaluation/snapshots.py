"""A run along its training: what snapshots there are, and figure 2 of the paper drawn from their records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from training.errors import RunError
from training.files import replacing
from training.record.plots import NEGLECTED, USED
from training.record.run import Run


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


def figure2(run: Run, records: list[dict[str, Any]]) -> Path:
    """Plot the Frechet distance of REC and GEN-1 over the epochs to figures/figure2.png, and return its path.

    Args:
        run: The run; a record without an epoch is of its last.
        records: Of one protocol.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, colour in (("REC", USED), ("GEN-1", NEGLECTED)):
        points = {
            record.get("epoch", run.recipe.epochs): record["value"] for record in records if record.get("set") == name
        }
        epochs = sorted(points)
        axis.plot(epochs, [points[epoch] for epoch in epochs], "o-", color=colour, markersize=4, label=name)
    axis.set_xlabel("epochs of stage 1")
    axis.set_ylabel(next(record["metric"] for record in records if "value" in record))
    axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    path = run.path / "figures" / "figure2.png"
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format="png")
    pyplot.close(figure)
    return path
