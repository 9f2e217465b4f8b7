"""A folder of samples: which there should be, which are missing, and the parallel making of those.

A job is (model, seed, range, temperature, format). Since a sample is the same picture whenever it is made,
a job that was stopped is completed by making what is missing, and one that grows keeps what it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from serve.encoding import ENDINGS, contact_sheet, encode
from serve.engine import Images
from serve.errors import JobError

MANIFEST = "manifest.json"
GRID = "grid.png"
SHARD = 1000  # samples in one .npy file
AHEAD = 8  # batches that may wait to be encoded and written: bounds memory


class Source(Protocol):
    """Where samples come from: an Engine, or a model on a server."""

    digest: str

    @property
    def name(self) -> str: ...

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """Yield (first index, images) for a range, in order."""


@dataclass(frozen=True)
class Job:
    """What a folder holds; this is what its manifest says."""

    model: str
    digest: str
    seed: int
    start: int
    count: int
    temperature: float
    format: str

    @property
    def stop(self) -> int:
        """The index after the last."""
        return self.start + self.count


def run(
    job: Job, source: Source, out: Path, replace_other: bool = False, done: Callable[[int], None] = lambda count: None
) -> int:
    """Complete a job's folder; return how many samples were missing and have been made.

    Args:
        job: What is wanted.
        source: Makes the samples.
        out: The folder; made if it is not there.
        replace_other: Whether a folder with another job's files may be taken over. They stay, unless of the
            same names.
        done: Told how many samples are on disk, as they get there.

    Raises:
        JobError: the folder holds something else, or cannot be written.
    """
    try:
        resumed = _claim(job, out, replace_other)
        present = _present(job, out) if resumed else np.zeros(job.count, bool)
        done(int(present.sum()))
        sharded = job.format == "npy"
        with ThreadPoolExecutor() as pool:
            waiting: dict[Future[None], int] = {}
            try:
                for first, images in _batches(job, source, present, sharded):
                    write = _write_shard if sharded else _write_pictures
                    waiting[pool.submit(write, job, out, first, images)] = len(images)
                    _collect(waiting, done, AHEAD)
                _collect(waiting, done, 1)
            finally:
                for each in waiting:
                    each.cancel()
    except OSError as error:
        raise JobError(
            f"cannot write to {out}: {error.strerror or error}; mend that, and the same command completes it"
        ) from None
    return int(job.count - present.sum())


def grid(job: Job, source: Source, out: Path, columns: int, rows: int) -> Path:
    """Write a contact sheet of the job's first samples; return its path.

    Raises:
        JobError: it cannot be written.
    """
    count = min(columns * rows, job.count)
    cells = [images for _, images in source.stream(job.seed, job.start, count, job.temperature)]
    sheet = contact_sheet(np.concatenate(cells), min(columns, count))
    try:
        with _replacing(out / GRID) as part:
            sheet.save(part, "PNG")
    except OSError as error:
        raise JobError(f"cannot write {out / GRID}: {error.strerror or error}") from None
    return out / GRID


def _claim(job: Job, out: Path, replace_other: bool) -> bool:
    """Make the folder this job's; tell whether it already was, so that its files count."""
    out.mkdir(parents=True, exist_ok=True)
    before = _read_manifest(out)
    if before is None and any(out.iterdir()) and not replace_other:
        raise JobError(f"{out} holds files that are not of a job; choose another --out, or pass --mix")
    same = before is not None and replace(before, count=job.count, model=job.model) == job
    if before is not None and not same and not replace_other:
        was, now = asdict(before), asdict(job)
        key = next(key for key in now if was[key] != now[key] and key not in ("count", "model"))
        raise JobError(
            f"{out} holds another job's files ({key} {was[key]}, not {now[key]}); choose another --out, or pass --mix"
        )
    kept = max(job.count, before.count) if same and before is not None else job.count
    _write_manifest(replace(job, count=kept), out)
    return same


def _read_manifest(out: Path) -> Job | None:
    try:
        values = json.loads((out / MANIFEST).read_text())
        return Job(**{key: values[key] for key in Job.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise JobError(f"{out / MANIFEST} is not a manifest of ours; choose another --out") from None


def _write_manifest(job: Job, out: Path) -> None:
    versions = {name: version(name) for name in ("balanced-vae", "numpy", "pillow")}
    with _replacing(out / MANIFEST) as part:
        part.write_text(json.dumps({**asdict(job), "versions": versions}, indent=2) + "\n")


def _present(job: Job, out: Path) -> Any:
    """Return which samples of the job are on disk, a bool each."""
    present = np.zeros(job.count, bool)
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(out) if entry.name[0].isdigit()}
    if job.format == "npy":
        for at in range(0, job.count, SHARD):
            path = out / shard_name(job.start + at)
            wanted = min(SHARD, job.count - at)
            if path.name in sizes and len(np.load(path, mmap_mode="r")) >= wanted:
                present[at : at + wanted] = True
        return present
    for at in range(job.count):
        present[at] = sizes.get(file_name(job.start + at, job.format), 0) > 0
    return present


def _batches(job: Job, source: Source, present: Any, sharded: bool) -> Iterator[tuple[int, Images]]:
    """Yield (first index, images) of what is missing: as the source gives them, or a whole shard at a time."""
    if sharded:
        for at in range(0, job.count, SHARD):
            count = min(SHARD, job.count - at)
            if not present[at : at + count].all():
                parts = source.stream(job.seed, job.start + at, count, job.temperature)
                yield job.start + at, np.concatenate([images for _, images in parts])
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[True], present, [True]]).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield from source.stream(job.seed, job.start + begin, end - begin, job.temperature)


def _collect(waiting: dict[Future[None], int], done: Callable[[int], None], fewer_than: int) -> None:
    """Wait until fewer than so many batches are being written; report those that are done."""
    while waiting and (len(waiting) >= fewer_than or any(each.done() for each in waiting)):
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for each in finished:
            count = waiting.pop(each)
            each.result()
            done(count)


def file_name(index: int, kind: str) -> str:
    """Return the file's name of a sample: its index, so that any range of any job has the same names."""
    return f"{index:09d}{ENDINGS[kind]}"


def shard_name(first: int) -> str:
    """Return the name of the .npy file that begins with a sample."""
    return f"{first:09d}.npy"


def _write_pictures(job: Job, out: Path, first: int, images: Images) -> None:
    for offset, image in enumerate(images):
        with _replacing(out / file_name(first + offset, job.format)) as part:
            part.write_bytes(encode(image, job.format))


def _write_shard(_: Job, out: Path, first: int, images: Images) -> None:
    with _replacing(out / shard_name(first)) as part, part.open("wb") as file:
        np.save(file, images)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes `path`'s place when all went well."""
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
