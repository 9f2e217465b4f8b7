"""Proof that a store is what its manifest says: a random part of its files is made again and compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serve.bulk import formats
from serve.bulk.job import Job
from serve.bulk.store import Store
from serve.errors import JobError
from serve.model import EXACT, GenerativeModel

ONE_LEVEL = 1  # what another processor or runtime may change in exact arithmetic


@dataclass(frozen=True)
class Verdict:
    """What came of it.

    Attributes:
        files: That there should be.
        tried: That were made again, of those that are there.
        same: Of these, those that are the same bytes.
        near: Those whose pictures are the same to one grey level.
        wrong: Names of the others of these: they are damaged, or hold other pictures.
        missing: Of all files, those that are not there.
        absent: The name of one of these.
    """

    files: int
    tried: int
    same: int
    near: int
    wrong: list[str]
    missing: int
    absent: str


def verify(
    job: Job,
    model: GenerativeModel,
    store: Store,
    fraction: float,
    done: Callable[[int], None] = lambda count: None,
    chance: random.Random | None = None,
) -> Verdict:
    """Make part of a job's files again and compare them; all have to be there.

    Args:
        job: What the manifest says.
        model: The same model.
        store: Where the files are.
        fraction: How much of them, 0 < fraction <= 1; one file at least.
        done: Called with the samples of each file that was compared. It may raise, to end this.
        chance: Chooses them.

    Raises:
        JobError: the model is another one, or computes in another arithmetic.
    """
    for what, wanted, received in (
        ("model", job.digest, model.digest),
        ("arithmetic", job.arithmetic, model.arithmetic),
    ):
        if wanted != received:
            raise JobError(f"{store} was made with the {what} {wanted}. Received: {received}; name that one")
    missing, absent = _missing(job, store)
    count = max(1, round(fraction * job.files))
    every = range(job.files)
    some = every if count == len(every) else sorted((chance or random.SystemRandom()).sample(every, count))
    tried = same = near = 0
    wrong = []
    for file in map(job.file, some):
        data = store.read(file.name)
        if data is not None:
            tried += 1
            parts, made = [], []
            for _, images in model.stream(job.seed, file.first, file.count, job.temperature):
                parts.append(formats.encoded(job, images))
                made.append(images)
            if formats.joined(job, file, parts) == data:
                same += 1
            elif _near(job, data, np.concatenate(made)):
                near += 1
            else:
                wrong.append(file.name)
        elif file.name in store.names(file.name.rpartition("/")[0]):
            tried += 1
            wrong.append(file.name)  # there is nothing to read, as of a link to nowhere
        done(file.count)
    return Verdict(job.files, tried, same, near, wrong, missing, absent)


def _missing(job: Job, store: Store) -> tuple[int, str]:
    """Return how many files are missing, and the name of the first."""
    count, first, listed, there = 0, "", "", store.names()
    for group in job.groups():
        for name in [job.file(number).name for number in group]:
            if (folder := name.rpartition("/")[0]) != listed:
                listed, there = folder, store.names(folder)
            if name not in there:
                count, first = count + 1, first or name
    return count, first


def _near(job: Job, data: bytes, made: np.ndarray) -> bool:
    """Tell whether a file holds these pictures to one grey level; where their encoding loses nothing."""
    if job.encoding == "jpeg" or job.arithmetic != EXACT:
        return False
    try:
        kept = formats.images(job, data)
    except JobError:
        return False
    if made.shape[-1] == 1 and not np.ptp(kept, axis=-1).any():
        kept = kept[..., :1]  # WebP knows no grey
    return kept.shape == made.shape and int(np.abs(kept.astype(np.int16) - made).max()) <= ONE_LEVEL
