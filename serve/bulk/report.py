"""How far a job is: a bar on a terminal, a line at the end, lines of JSON for programs, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

FEW = 100  # samples that need no bar
EVERY = 1.0  # seconds between lines of JSON


class Report:
    """What is said of a job, as it goes on and at its end. A bar goes to stderr, all else to stdout.

    Args:
        way: "text", "json" or "quiet".
        label: What is made.
        total: How many samples there are to be.
    """

    def __init__(self, way: str, label: str, total: int) -> None:
        self._way, self._label, self._total = way, label, total
        self._out = sys.stdout  # of this command, whatever a library makes of it meanwhile
        self._began = self._said = time.monotonic()
        self._done = self._made = self._bytes = 0
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show a bar as long as the block lasts, where somebody looks."""
        if self._way != "text" or self._total <= FEW or not sys.stderr.isatty():
            yield
            return
        # Late, as a single picture is made in less time than these take to import.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=Console(stderr=True)) as self._bar:
            self._task = self._bar.add_task(self._label, total=self._total, speed="")
            yield

    def more(self, count: int, size: int, made: bool = True) -> None:
        """Count samples that are kept, and the bytes of those that were made now, whose rate is shown."""
        self._done += count
        if made:
            self._made += count
            self._bytes += size
        if self._bar is not None and count:
            rates = self._rates()
            speed = f"{rates['images_per_second']:,.0f} images/s {rates['megabytes_per_second']:,.1f} MB/s"
            self._bar.update(self._task, advance=count, speed=speed)
        now = time.monotonic()
        if self._way == "json" and now - self._said >= EVERY:
            self._said = now
            self._line("progress", samples=self._done, of=self._total, **self._rates())

    def end(self, out: str, made: int, found: int) -> None:
        """Say what came of it."""
        if self._way == "json":
            self._line("end", out=out, made=made, found=found, **self._rates())
        elif self._way == "text":
            seconds = time.monotonic() - self._began
            speed = f" in {seconds:.1f} s ({made / seconds:,.0f} images/s)" if made else ""
            click.echo(f"{made:,} made{speed}, {found:,} were there: {out}", file=self._out)

    def say(self, text: str, **facts: Any) -> None:
        """Say something else: a line of text, or its facts in JSON, the first of which is the event."""
        if self._way == "json":
            event, *_ = facts
            self._line(event, **facts)
        elif self._way == "text":
            click.echo(text, file=self._out)

    def _rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return {
            "seconds": round(seconds, 3),
            "images_per_second": round(self._made / seconds, 1),
            "megabytes_per_second": round(self._bytes / seconds / 1e6, 2),
        }

    def _line(self, event: str, **facts: Any) -> None:
        click.echo(json.dumps({"event": event, **facts}), file=self._out)
