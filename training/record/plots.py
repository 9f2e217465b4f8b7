"""Plots of a run's records, as PNGs. matplotlib is imported late, as nothing else needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.data.images import SHEET
from training.files import replacing
from training.model.latents import ACTIVE_BELOW
from training.types import Float64Array, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

USED, NEGLECTED, REFERENCE = "#2a6f97", "#e07a3f", "#8d99a6"
TICKS = [digit * 10.0**exponent for exponent in range(-9, 10) for digit in (1, 2, 5)]  # of logarithmic axes
INK, SOFT = "#22303c", "#66727f"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c3cad1",
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure, its size in inches of 100 pixels; write it when the block ends well."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE), replacing(path) as part:
        figure = Figure(figsize=(width, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        yield figure
        canvas: Any = FigureCanvasAgg(figure)  # whose methods have no types
        canvas.print_png(part, metadata={"Software": SHEET})  # savefig would draw it twice


def _titles(axis: Axes, title: str, hint: str) -> None:
    """Write a title, and below it a hint of what to look for."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=21)
    axis.annotate(hint, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9, color=SOFT)


def variances(path: Path, variance: Float64Array) -> None:
    """Plot the histogram of the latents' mean posterior variances [latents] (figure 5)."""
    edges = np.linspace(0, 1.25, 26)
    counts = np.histogram(np.minimum(variance, edges[-2]), edges)[0]
    colors = np.where(edges[1:] <= ACTIVE_BELOW + 1e-9, USED, NEGLECTED)
    ticks = {tick: f"{tick:g}" for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)} | {1.2: "1.2+"}
    used = int(np.sum(variance < ACTIVE_BELOW))
    with _figure(path, 10, 4.5) as figure:
        axis = figure.subplots()
        axis.bar(edges[:-1], counts, 0.05, align="edge", color=colors.tolist(), edgecolor="white", linewidth=1)
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.grid(axis="x", visible=False)
        _whole(axis.yaxis)
        axis.set_xlabel("mean posterior variance")
        axis.set_ylabel("latents")
        _titles(axis, f"{used} of {len(variance)} latents are used", "near 0: used, near 1: neglected")


def along_first_epoch(path: Path, trace: list[Record]) -> None:
    """Plot each latent's mean posterior variance along the first epoch's minibatches (figure 6)."""
    _each_latent(path, "Each latent along the first epoch", [point["step"] for point in trace], trace, _minibatches)


def along_training(path: Path, stage: list[Record]) -> None:
    """Plot each latent's mean posterior variance along a stage's epochs (figure 7)."""
    _each_latent(path, "Each latent along training", [record["epoch"] for record in stage], stage, _epochs)


def _each_latent(
    path: Path, title: str, positions: list[int], records: list[Record], scale: Callable[[Axes], None]
) -> None:
    variance = np.asarray([record["latent_variance"] for record in records])  # [positions, latents]
    used = variance[-1] < ACTIVE_BELOW
    with _figure(path, 10, 5.2) as figure:
        axis = figure.subplots()
        for which, color, label in ((~used, NEGLECTED, "end up neglected"), (used, USED, "end up used")):
            lines = axis.plot(positions, variance[:, which], color=color, linewidth=0.8, alpha=0.6, **_marks(positions))
            if lines:
                lines[0].set_label(f"{len(lines)} {label}")
        axis.axhline(ACTIVE_BELOW, color=REFERENCE, linewidth=1, linestyle=(0, (4, 3)))
        scale(axis)
        axis.set_ylim(0, max(1.05, 1.03 * float(variance.max())))
        axis.set_ylabel("mean posterior variance")
        _legend(axis)
        _titles(axis, title, "falls towards 0: used, stays near 1: neglected")


def _legend(axis: Axes) -> None:
    """Write the legend beside the title, where no curve is."""
    for handle in axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0).get_lines():
        handle.set(alpha=1, linewidth=2)


def _marks(positions: list[int]) -> dict[str, Any]:
    """Return options that make one or two points visible, as a line hardly is."""
    return {"marker": "o", "markersize": 4} if len(positions) < 3 else {}


def _minibatches(axis: Axes) -> None:
    axis.set_xscale("log")
    ticks = [tick for tick in TICKS if 1 <= tick <= axis.dataLim.x1]
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("minibatch of the first epoch")


def _decades(axis: Axes) -> None:
    """Make y logarithmic, from a tick below the data to one above it, with plain numbers as labels."""
    low, high = axis.dataLim.intervaly
    first = max((tick for tick in TICKS if tick < low), default=TICKS[0])
    last = min((tick for tick in TICKS if tick > high), default=TICKS[-1])
    ticks = [tick for tick in TICKS if first <= tick <= last]
    axis.set_yscale("log")
    axis.set_ylim(first, last)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)


def _epochs(axis: Axes) -> None:
    _whole(axis.xaxis)
    axis.set_xlabel("epoch")


def _whole(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def distances(path: Path, metric: str, curves: dict[str, dict[int, float]]) -> None:
    """Plot distances over the epochs of stage 1, a curve by its name: epoch -> distance (figure 2)."""
    with _figure(path, 10, 4.5) as figure:
        axis = figure.subplots()
        for (name, points), color in zip(curves.items(), (USED, NEGLECTED), strict=True):
            epochs = list(points)
            axis.plot(epochs, list(points.values()), color=color, label=name, clip_on=False, **_marks(epochs))
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
        axis.set_ylabel(metric)
        _epochs(axis)
        _legend(axis)
        _titles(axis, "Distance from real pictures along training", "falls, then levels off; near 0: like real ones")


def history(path: Path, records: list[Record]) -> None:
    """Plot the terms of the loss, the balance and the latents over the epochs: a row a stage."""
    stages = [[record for record in records if record["stage"] == stage] for stage in (1, 2, 3)]
    rows = [(stage, [panel for name, panel in _PANELS if _has(stage, name)]) for stage in stages if stage]
    columns = max(len(panels) for _, panels in rows)
    with _figure(path, 3.2 * columns, 3.1 * len(rows)) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for (stage, panels), places in zip(rows, axes, strict=True):
            for panel, axis in zip(panels, places, strict=False):
                panel(axis, stage)
                _epochs(axis)
            for axis in places[len(panels) :]:
                axis.set_visible(False)


def _has(stage: list[Record], name: str) -> bool:
    """Tell whether a stage recorded a quantity. A penalty that is zero throughout counts as none."""
    return name in stage[-1] and (name != "penalty" or any(record[name] for record in stage))


def _curve(axis: Axes, stage: list[Record], name: str, **options: Any) -> None:
    having = [record for record in stage if name in record]  # pictures to validate with may have come later
    epochs, values = [record["epoch"] for record in having], [record[name] for record in having]
    axis.plot(epochs, values, **{"color": USED, "clip_on": False, **_marks(epochs), **options})


def _error(axis: Axes, stage: list[Record]) -> None:
    _curve(axis, stage, "mse", label="training")
    held_back = "validation_mse" in stage[-1]
    if held_back:
        _curve(axis, stage, "validation_mse", color=NEGLECTED, label="validation")
        axis.legend(fontsize=8)
    _decades(axis)
    axis.set_ylabel(f"mean squared error, {'latents' if stage[0]['stage'] == 2 else 'pixels 0 to 1'}")
    hint = "validation rises: learned by heart" if held_back else "falls, then levels off"
    if stage[0]["stage"] == 3:
        hint = "rises: what is sharp is seldom right"
    _titles(axis, f"Stage {stage[0]['stage']}: error", hint)


def _plain(name: str, label: str, title: str, hint: str) -> Callable[[Axes, list[Record]], None]:
    """Return a panel with one curve and y from zero on."""

    def panel(axis: Axes, stage: list[Record]) -> None:
        _curve(axis, stage, name)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
        _titles(axis, title, hint)

    return panel


def _gamma(axis: Axes, stage: list[Record]) -> None:
    roots = [{**record, "root": math.sqrt(record["mse"])} for record in stage]
    _curve(axis, roots, "root", color=REFERENCE, linestyle=(0, (4, 3)), label="root of the error")
    _curve(axis, stage, "gamma", label="gamma")
    _decades(axis)
    axis.legend(fontsize=8)
    axis.set_ylabel("gamma")
    _titles(axis, "Balance", "balanced where the two meet")


def _active(axis: Axes, stage: list[Record]) -> None:
    _curve(axis, stage, "active")
    latents = stage[-1]["latents"]
    axis.set_ylim(0, latents * 1.04)
    _whole(axis.yaxis)
    axis.set_ylabel("latents")
    _titles(axis, f"Active: {stage[-1]['active']} of {latents}", f"mean posterior variance below {ACTIVE_BELOW}")


def _law(axis: Axes, stage: list[Record]) -> None:
    _curve(axis, stage, "variance_law")
    if "active" in stage[-1]:
        axis.axhline(1, color=REFERENCE, linewidth=1, linestyle=(0, (4, 3)))
        _titles(axis, "Variance law", "near 1: the KL divergence works")
    else:
        _titles(axis, "Latents' variance", "levels off; near 0: collapsed")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("variance of a latent")


_PANELS: tuple[tuple[str, Callable[[Axes, list[Record]], None]], ...] = (
    ("mse", _error),
    ("kl", _plain("kl", "nats per item", "KL divergence", "information in the latents; 0: none")),
    ("embedding", _plain("embedding", "|z|² / 2", "Latents' length", "levels off; grows: weight too small")),
    ("penalty", _plain("penalty", "before its weight", "Decoder's penalty", "levels off; grows: weight too small")),
    ("gamma", _gamma),
    ("matching", _plain("matching", "relative distance", "Critic's features", "pictures and reconstructions: falls")),
    ("critic", _plain("critic", "hinge loss", "Critic", "2: sees no difference; 0: sees all of it")),
    ("active", _active),
    ("variance_law", _law),
)
