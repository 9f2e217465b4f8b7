"""Pictures of a run: grids of samples, and the history plotted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.run import Record, replacing


def grid(path: Path, images: npt.NDArray[np.uint8]) -> None:
    """Write images [n, h, w, c] as one PNG, in rows, as square as can be."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    sheet = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    with replacing(path) as part:
        Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(part, "PNG")


def history(path: Path, records: list[Record]) -> None:
    """Plot mse, KL, gamma and active latents of both stages over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [[record for record in records if record["stage"] == stage] for stage in (1, 2)]
    stages = [stage for stage in stages if stage]
    figure, axes = pyplot.subplots(len(stages), 4, figsize=(14, 3 * len(stages)), squeeze=False)
    for row, stage in zip(axes, stages, strict=True):
        epochs = [record["epoch"] + 1 for record in stage]
        for axis, (name, label) in zip(row, _CURVES, strict=True):
            axis.plot(epochs, [record[name] for record in stage], color="#2a6f97", linewidth=1.5)
            axis.set_title(f"stage {stage[0]['stage']}: {label}", fontsize=10)
            axis.set_xlabel("epoch", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            _scale(axis, name)
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=90, format="png")
    pyplot.close(figure)


_CURVES = (
    ("mse", "mean squared error"),
    ("kl", "KL divergence, nats"),
    ("gamma", "gamma"),
    ("active", "active latents"),
)


def _scale(axis: Any, name: str) -> None:
    if name in ("mse", "gamma"):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
