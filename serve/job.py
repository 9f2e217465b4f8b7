"""A folder of samples: which there should be, which are missing, and the parallel making of those.

A job is (model, arithmetic, seed, range, temperature, format). Since a sample is the same picture whenever it is made,
a job that was stopped is completed by making what is missing, and one that grows keeps what it has.

What keeps a folder from ever mixing two jobs, however they end: one process at a time holds it; a file is whole or
not there; and the manifest names a job only once nothing else has the names of that job's files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import PIL
from filelock import FileLock, Timeout

from serve.encoding import ENDINGS, contact_sheet, encode, whole
from serve.errors import JobError
from serve.model import EXACT, GenerativeModel, Images
from serve.version import VERSION

MANIFEST = "manifest.json"
GRID = "grid.png"
LOCK = ".sample-cli.lock"
PART = re.compile(r"\.part-(\d{9,}\.(npy|png|jpg|webp)|manifest\.json|grid\.png)", re.ASCII)  # half-written files
INDEX = re.compile(r"\d{9,19}(?=\.)", re.ASCII)
SHARDS = "npy"  # the format of many samples a file
SHARD = 1000  # samples in one of these
AHEAD = 8  # batches that may wait to be encoded and written: bounds memory


@dataclass(frozen=True)
class Job:
    """What a folder holds; this is what its manifest says."""

    model: str
    digest: str
    arithmetic: str
    seed: int
    start: int
    count: int
    temperature: float
    format: str


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make a folder, and keep every other job out of it as long as the block lasts.

    The lock goes with the process, however that ends; what a process left half-written is removed.

    Raises:
        JobError: another job holds the folder, or it can be neither written nor locked.
    """
    lock = FileLock(out / LOCK, timeout=0, fallback_to_soft=False)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise JobError(f"another sample-cli is writing to {out}; wait for it, or choose another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise JobError(
                f"cannot lock {out} ({error.strerror}): choose an --out on a file system that has locks"
            ) from None
    try:
        with _writing(out):
            for path in out.iterdir():
                if PART.fullmatch(path.name):
                    path.unlink()
        yield
    finally:
        with suppress(OSError):  # a lock file that stays does no harm
            (out / LOCK).unlink()
        lock.release()


def run(
    job: Job,
    model: GenerativeModel,
    out: Path,
    replace_other: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Complete a job's folder; return how many samples were missing, or damaged, and have been made.

    Args:
        job: What is wanted.
        model: Makes the samples.
        out: The folder; to be held.
        replace_other: Whether a folder with other files may be taken over. They stay, unless of the same names.
        done: Called with how many more samples are on disk, as they get there, and in between with 0. It may raise, to
            end the job.

    Raises:
        JobError: the folder holds something else, or cannot be written.
    """
    with _writing(out):
        _claim(job, out, replace_other)
        present = _present(job, model.card.image_shape, out)
        done(int(present.sum()))
        with ThreadPoolExecutor() as pool:
            waiting: dict[Future[None], int] = {}
            try:
                for first, images in _batches(job, model, present, done):
                    write = _write_shard if job.format == SHARDS else _write_pictures
                    waiting[pool.submit(write, job, out, first, images)] = len(images)
                    _collect(waiting, done, AHEAD)
                _collect(waiting, done, 1)
            finally:
                for each in waiting:
                    each.cancel()
    return int(job.count - present.sum())


def grid(job: Job, model: GenerativeModel, out: Path, columns: int, rows: int) -> Path:
    """Write a contact sheet of the job's first samples into its folder, to be held; return its path.

    Raises:
        JobError: it cannot be written.
    """
    count = min(columns * rows, job.count)
    cells = [images for _, images in model.stream(job.seed, job.start, count, job.temperature)]
    sheet = contact_sheet(np.concatenate(cells), min(columns, count))
    with _writing(out), _replacing(out / GRID) as file:
        file.write(sheet)
    return out / GRID


def _claim(job: Job, out: Path, replace_other: bool) -> None:
    """Make the folder this job's: from here on, what has the name of a file of the job is that file."""
    before = _read_manifest(job, out, replace_other)
    if before is None and not replace_other and any(path.name != LOCK for path in out.iterdir()):
        raise JobError(f"{out} holds files that are not of a job; choose another --out, or pass --mix")
    same = before is not None and replace(before, count=job.count, model=job.model) == job
    if before is not None and not same and not replace_other:
        was, now = asdict(before), asdict(job)
        key = next(key for key in now if was[key] != now[key] and key not in ("count", "model"))
        raise JobError(
            f"{out} holds another job's files ({key} {was[key]}, not {now[key]}); choose another --out, or pass --mix"
        )
    ours = before.count if before is not None and same else 0
    for at, path in list(_files(job, out)):
        if at >= ours:
            if not replace_other:
                raise JobError(f"{path} is not of this job; choose another --out, or pass --mix to replace it")
            path.unlink()
    _write_manifest(replace(job, count=max(job.count, ours)), out)


def _read_manifest(job: Job, out: Path, replace_other: bool) -> Job | None:
    try:
        values = json.loads((out / MANIFEST).read_text())
        values = {"arithmetic": EXACT, **values}  # older manifests do not say: it was all that there was
        before = Job(**{key: values[key] for key in Job.__dataclass_fields__})
        if [*map(type, asdict(before).values())] != [*map(type, asdict(job).values())]:
            raise TypeError
        return before
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        if replace_other:
            return None
        raise JobError(
            f"{out / MANIFEST} is damaged, or not of sample-cli; choose another --out, or pass --mix to make all anew"
        ) from None


def _write_manifest(job: Job, out: Path) -> None:
    versions = {"balanced-vae": VERSION, "numpy": np.__version__, "pillow": PIL.__version__}
    versions["zlib"] = zlib.ZLIB_RUNTIME_VERSION
    with _replacing(out / MANIFEST) as file:
        file.write((json.dumps({**asdict(job), "versions": versions}, indent=2) + "\n").encode())


def _files(job: Job, out: Path) -> Iterator[tuple[int, Path]]:
    """Yield what has the name of a file of the job, after how many samples of the job it begins."""
    for path in out.iterdir():
        match = INDEX.match(path.name)
        at = int(match[0]) - job.start if match else -1
        begins_file = job.format != SHARDS or at % SHARD == 0
        if 0 <= at < job.count and begins_file and path.name == file_name(job.start + at, job.format):
            yield at, path


def _present(job: Job, shape: tuple[int, int, int], out: Path) -> npt.NDArray[np.bool_]:
    """Return which samples of the job are on disk, in files that are whole."""
    present = np.zeros(job.count, bool)
    for at, path in _files(job, out):
        if not path.is_file():  # a pipe would be waited for
            continue
        if job.format == SHARDS:
            wanted = min(SHARD, job.count - at)
            present[at : at + wanted] = wanted <= _stored(path, shape) <= SHARD
        else:
            present[at] = whole(path, job.format)
    return present


def _stored(path: Path, shape: tuple[int, int, int]) -> int:
    """Return how many samples of a shape a .npy file holds: 0 where it is damaged."""
    try:
        images = np.lib.format.open_memmap(path, mode="r")
        if images.dtype != np.uint8 or images.shape[1:] != shape or not images.flags.c_contiguous:
            return 0
        return len(images) if path.stat().st_size == images.offset + images.nbytes else 0
    except Exception:  # whatever a damaged header makes the parsers raise
        return 0


def _batches(
    job: Job, model: GenerativeModel, present: npt.NDArray[np.bool_], done: Callable[[int], None]
) -> Iterator[tuple[int, Images]]:
    """Yield (first index, images) of what is missing: as the model gives them, or a whole shard at a time."""
    if job.format == SHARDS:
        for at in range(0, job.count, SHARD):
            count = min(SHARD, job.count - at)
            if not present[at : at + count].all():
                parts = []
                for _, images in model.stream(job.seed, job.start + at, count, job.temperature):
                    parts.append(images)
                    done(0)
                yield job.start + at, np.concatenate(parts)
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[True], present, [True]]).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield from model.stream(job.seed, job.start + begin, end - begin, job.temperature)


def _collect(waiting: dict[Future[None], int], done: Callable[[int], None], fewer_than: int) -> None:
    """Wait until fewer than so many batches are being written; report those that are done."""
    while waiting and (len(waiting) >= fewer_than or any(each.done() for each in waiting)):
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for each in finished:
            count = waiting.pop(each)
            each.result()
            done(count)


def file_name(first: int, kind: str) -> str:
    """Return a file's name: the index of its first sample, so that any range of any job has the same names."""
    return f"{first:09d}{ENDINGS.get(kind, '.npy')}"


def _write_pictures(job: Job, out: Path, first: int, images: Images) -> None:
    for index, image in enumerate(images, first):
        # Thousands of these would wait for the disk; one that a power cut damaged is found and made again.
        with _replacing(out / file_name(index, job.format), lasting=False) as file:
            file.write(encode(image, job.format))


def _write_shard(job: Job, out: Path, first: int, images: Images) -> None:
    with _replacing(out / file_name(first, job.format)) as file:
        np.save(file, images)


@contextmanager
def _replacing(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes `path`'s place when all went well; on the disk itself, if lasting."""
    part = path.with_name(f".part-{path.name}")
    try:
        with part.open("wb") as file:
            yield file
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(
            f"cannot write to {out}: {error.strerror or error}; mend that, and the same command completes it"
        ) from None
