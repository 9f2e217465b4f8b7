"""TensorBoard events, written from the run's own records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from training.files import writing
from training.record.run import Run
from training.record.stage import Schedule
from training.types import Record

_POSITION = ("stage", "epoch", "images")  # a record's place, and not a measurement


class TensorBoardWriter:
    """Writes every epoch's record for TensorBoard, to run.path/tensorboard.

    Scalars go to stage1/NAME, stage2/NAME and, of sharpening, stage3/NAME; the latents' mean posterior variances are
    a histogram, and grids of samples are images. A step is a picture seen, or in stage 2 a latent; each stage counts on
    from where the one before ended, so that a run is one line in time. Events are in the file when `epoch` returns.

    The events are a copy of the run's history. The first epoch after a start writes the whole history again, so that
    no step is there twice, however the run was stopped before.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder = run.path / "tensorboard"
        self.writer: EventsWriter | None = None
        self.seen: dict[int, int] = {}  # by each stage, as far as it is written: pictures, or latents

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None and kind is None:  # every epoch was flushed; an error is reported only once
            with writing(self.folder):
                self.writer.close()

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
        """Do nothing: only the means of an epoch are written."""

    def note(self, text: str) -> None:
        """Do nothing: what is noted is for whoever waits."""

    def epoch(self, schedule: Schedule, record: Record) -> None:
        """Write a record, the last one of the run's history.

        Raises:
            WriteError: the events cannot be written.
        """
        with writing(self.folder):
            if self.writer is None:
                records, self.writer = self.run.history(), self._anew()
            else:
                records = [record]
            for each in records:
                self.seen[each["stage"]] = each["images"]
                step = sum(seen for stage, seen in self.seen.items() if stage <= each["stage"])
                for part in self._summaries(each):
                    self._write(summary=part, step=step)
            self.writer.flush()

    def _anew(self) -> EventsWriter:
        """Return a writer to a new file, and delete older ones. A running TensorBoard drops what it read of those."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        # SummaryWriter would write in a thread, which does not report a full disk.
        self.writer = EventsWriter(str(self.folder / "events"))
        self._write(session_log=SessionLog(status=SessionLog.START), step=0)
        return self.writer

    def _write(self, **event: Any) -> None:
        assert self.writer is not None
        self.writer.write_event(Event(wall_time=time.time(), **event))

    def _summaries(self, record: Record) -> Iterator[Any]:
        stage = f"stage{record['stage']}"
        for name, value in record.items():
            if name not in _POSITION and isinstance(value, int | float):
                yield summary.scalar(f"{stage}/{name}", value)
        if "active" in record:  # a deterministic encoder's variances are all zero
            yield summary.histogram(f"{stage}/latent_variance", np.asarray(record["latent_variance"]), bins="auto")
        grid = self.run.path / "samples" / f"{stage}-{record['epoch']:04d}.png"
        if grid.exists():
            with Image.open(grid) as picture:
                yield summary.image(f"{stage}/samples", np.asarray(picture.convert("RGB")), dataformats="HWC")
