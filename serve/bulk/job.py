"""What is wanted: samples of one model, and the files that hold them.

A file's name tells the range that it holds, so the files of any range of any job have the same names everywhere. Those
of shards that others load - Parquet and WebDataset - also have a tag, a hash of what their pictures depend on: in a
store without locks another job's shards have other names.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import PIL

from serve.encoding import ENDINGS
from serve.model import EXACT
from serve.version import VERSION

ARRAYS, PARQUET, WEBDATASET = "npy", "parquet", "webdataset"
SHARD_ENDINGS = {PARQUET: ".parquet", WEBDATASET: ".tar"}
SHARDS = {ARRAYS: 1000, PARQUET: 10_000, WEBDATASET: 10_000}  # samples in one file, where nothing else is asked for
FORMATS = (*ENDINGS, *SHARDS)
INDEX = re.compile(r"\d{9,19}(?=[-.])", re.ASCII)
FOLDER = 10_000  # pictures in one folder: those with smaller indices lie at the top


@dataclass(frozen=True)
class File:
    """One file of a job.

    Attributes:
        name: Its path within the store, with "/".
        first: The index of its first sample.
        count: Its samples.
    """

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Job:
    """What a store holds; this is what its manifest says.

    Attributes:
        model: The model's name.
        digest: SHA-256 of the model file.
        arithmetic: As `GenerativeModel.arithmetic`.
        seed: Of the noise.
        start: The first index.
        count: How many samples.
        temperature: The scale of the noise.
        format: One of FORMATS.
        shard: Samples in one file; 1 where each picture is one.
        encoding: What pictures are encoded as, one of `encoding.FORMATS`; "" in arrays.
    """

    model: str
    digest: str
    arithmetic: str
    seed: int
    start: int
    count: int
    temperature: float
    format: str
    shard: int
    encoding: str

    @property
    def files(self) -> int:
        """How many files there are."""
        return -(-self.count // self.shard)

    def file(self, number: int) -> File:
        """Return one of the files, 0 <= number < files."""
        at = number * self.shard
        first, count = self.start + at, min(self.shard, self.count - at)
        return File(self.name(first, count), first, count)

    def name(self, first: int, count: int) -> str:
        """Return the name of the file of a range."""
        if self.tagged:
            return f"{first:012d}-{first + count - 1:012d}{self.ending}"
        folder = f"{first // FOLDER:06d}/" if self.format in ENDINGS and first >= FOLDER else ""
        return f"{folder}{first:09d}{self.ending}"

    def first(self, name: str) -> int:
        """Return the index that a file's name begins with, or -1."""
        found = INDEX.match(name.rpartition("/")[2])
        return int(found[0]) if found else -1

    def has(self, name: str) -> bool:
        """Tell whether a file of the job has this name."""
        at = self.first(name) - self.start
        return 0 <= at < self.count and at % self.shard == 0 and self.file(at // self.shard).name == name

    @property
    def tagged(self) -> bool:
        """Whether files have names of this job's own."""
        return self.format in (PARQUET, WEBDATASET)

    @property
    def ending(self) -> str:
        """What all files' names end with."""
        if not self.tagged:
            return ENDINGS.get(self.format, ".npy")
        said = [self.digest, self.arithmetic, self.seed, self.temperature, self.encoding]
        tag = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
        return f"-{tag}{SHARD_ENDINGS[self.format]}"

    def groups(self, part: int = 0, parts: int = 1) -> Iterator[range]:
        """Yield the numbers of files that are looked after together: of one folder, or one shard.

        Args:
            part: Which of so many parts: every parts-th shard, from this one on; of single pictures, a stretch.
            parts: How many there are.
        """
        if self.format not in ENDINGS:
            yield from (range(number, number + 1) for number in range(part, self.files, parts))
            return
        begin, stop = (self.start + self.count * edge // parts for edge in (part, part + 1))
        for folder in range(begin // FOLDER, -(-stop // FOLDER)):
            first, end = max(folder * FOLDER, begin), min((folder + 1) * FOLDER, stop)
            yield range(first - self.start, end - self.start)

    def same_but_longer(self, other: Job) -> bool:
        """Tell whether another job wants the same pictures in the same files, of a range that may end elsewhere."""
        return replace(other, count=self.count, model=self.model) == self


def make(
    model: str,
    digest: str,
    arithmetic: str,
    *,
    count: int,
    seed: int = 0,
    start: int = 0,
    temperature: float = 1.0,
    kind: str = "png",
    shard: int = 0,
    encoding: str = "",
) -> Job:
    """Return a job of a format, `kind`, with its own shards and encoding where none are given: 0 and ""."""
    if kind in ENDINGS:
        shard, encoding = 1, kind
    elif kind == ARRAYS:
        encoding = ""
    else:
        encoding = encoding or "png"
    return Job(model, digest, arithmetic, seed, start, count, temperature, kind, shard or SHARDS[kind], encoding)


def to_json(job: Job, **more: Any) -> bytes:
    """Return a manifest."""
    used = versions()
    if job.format == PARQUET:
        used["pyarrow"] = import_module("pyarrow").__version__
    return (json.dumps({**asdict(job), "versions": used, **more}, indent=2) + "\n").encode()


def versions() -> dict[str, str]:
    """Return the versions of what makes and encodes pictures."""
    return {
        "balanced-vae": VERSION,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def from_json(data: bytes) -> Job:
    """Return the job of a manifest.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(data)
        kind = values["format"]
        # Older manifests do not say: these were all that there was.
        older = {"arithmetic": EXACT, "shard": SHARDS.get(kind, 1), "encoding": kind if kind in ENDINGS else ""}
        job = Job(**{key: {**older, **values}[key] for key in Job.__dataclass_fields__})
        like = Job("", "", "", 0, 0, 0, 0.0, "", 0, "")
        if [*map(type, asdict(job).values())] != [*map(type, asdict(like).values())] or job.shard < 1:
            raise ValueError("its values have other types")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it says other things than a manifest does: {error}") from None
    return job
