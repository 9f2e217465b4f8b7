"""Progress on stderr: a live display in a terminal, a line an epoch in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from training.record.stage import Schedule
from training.types import Record

LINES = 5.0  # seconds between two lines of finished epochs above the bar
REFRESH = 0.25  # seconds between updates; not every step is shown, as reading a loss waits for the device


@contextmanager
def reading() -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (pictures done, pictures in all) while they are decoded. It moves a bar."""
    console = Console(stderr=True)
    columns = (TextColumn("decoding"), BarColumn(bar_width=None), TextColumn("{task.completed:,}/{task.total:,}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


class ProgressDisplay(Progress):
    """Shows the progress of training on stderr.

    In a terminal that is a bar, with the losses on a line below it: 80 columns have no room for both in one line.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.task: TaskID | None = None
        self.stage = 0
        self.active = ""
        self.shown = self.lined = 0.0
        self.mark = (0, 0.0)
        self.numbers = ""
        super().__init__(
            TextColumn("[bold]stage {task.fields[stage]}"),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
            disable=not console.is_terminal,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.numbers)

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        """Move the bar, at most a few times a second."""
        now = time.monotonic()
        if self.disable or now - self.shown < REFRESH:
            return
        self.shown = now
        done = epoch * schedule.images + images
        self._begin(schedule, done, now)
        assert self.task is not None
        speed = (done - self.mark[0]) / max(now - self.mark[1], 1e-9)
        self.update(
            self.task,
            completed=done,
            epoch=f"{epoch + 1}/{schedule.epochs}",
            speed=f"{speed:,.0f} images/s" if done > self.mark[0] else "",
        )
        self.numbers = _numbers(logs) + self.active

    def _begin(self, schedule: Schedule, done: int, now: float) -> None:
        if self.stage == schedule.stage:
            return
        if self.task is not None:
            self.remove_task(self.task)
        self.stage, self.active, self.mark = schedule.stage, "", (done, now)
        self.task = self.add_task(
            "",
            total=schedule.epochs * schedule.images,
            completed=done,
            stage=schedule.stage,
            epoch="",
            speed="",
        )

    def epoch(self, schedule: Schedule, record: Record) -> None:
        """Print a line, which stays above the bar; on a terminal no more than one every few seconds, and the last."""
        self.active = f"  active {record['active']}/{record['latents']}" if "active" in record else ""
        now = time.monotonic()
        last = record["epoch"] == schedule.epochs
        if not self.disable and not last and now - self.lined < LINES:
            return
        self.lined = now
        epoch = f"stage {schedule.stage} epoch {record['epoch']}/{schedule.epochs}"
        speed = f"{record['images_per_second']:,.0f} images/s"
        left = (
            (schedule.epochs - record["epoch"]) * schedule.images / max(record["images_per_second"], 0.05)
        )  # which is rounded
        self.note(f"{epoch}  {speed}  ETA {left / 60:,.1f} min  {_numbers(record)}{self.active}")

    def note(self, text: str) -> None:
        """Print a line, which stays."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _numbers(values: dict[str, Any]) -> str:
    return "  ".join(f"{label} {float(values[name]):{form}}" for name, label, form in _SHOWN if name in values)


_SHOWN = (("mse", "mse", ".5f"), ("kl", "KL", ".2f"), ("gamma", "gamma", ".4f"))
