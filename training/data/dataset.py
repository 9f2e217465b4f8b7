"""The pictures of a run: checked, decoded once, and mapped into memory.

Nothing here imports Keras, so that bad data is reported at once.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data import store
from training.data.cache import Cache, default_folder
from training.data.images import in_parallel, why
from training.data.sources import UNREADABLE, PictureSource, opened
from training.data.splits import SPLITS, Advance, Report
from training.data.store import Stored
from training.errors import DataError
from training.recipe import Recipe
from training.types import IndexArray, UInt8Array

FORMAT = 1  # of stored pictures: to be raised when the same source would give other pictures or another file


class _File:
    """Reads pictures of a memory map from its file.

    Touching the map would fetch one page after the other, and keep all of them in the process's memory. Here the
    kernel is told of a whole batch first, and the process keeps only that batch.
    """

    def __init__(self, images: Any) -> None:
        self.file = open(images.filename, "rb")  # noqa: SIM115  # open as long as the data set
        begin = images.offset - images.offset % mmap.ALLOCATIONGRANULARITY
        self.first = begin + images.ctypes.data - np.frombuffer(images._mmap, np.uint8).ctypes.data
        self.step, self.shape = images.strides[0], images.shape

    def rows(self, indices: IndexArray) -> UInt8Array:
        count, *shape = self.shape
        if len(indices) and not 0 <= indices.min() <= indices.max() < count:
            raise IndexError(f"pictures go from 0 to {count - 1}. Received: {indices.min()} to {indices.max()}")
        pictures = np.empty((len(indices), *shape), np.uint8)
        rows = pictures.reshape(len(indices), -1)
        places = (self.first + indices * self.step).tolist()
        if hasattr(os, "posix_fadvise"):
            for place in places:
                os.posix_fadvise(self.file.fileno(), place, rows.shape[1], os.POSIX_FADV_WILLNEED)
        try:
            read = [os.preadv(self.file.fileno(), [row.data], place) for row, place in zip(rows, places, strict=True)]
        except OSError as error:
            raise DataError(f"cannot read {self.file.name}: {why(error)}") from None
        if read != [len(row) for row in rows]:
            raise DataError(f"cannot read {self.file.name}: it was cut short while it was in use")
        return pictures


@dataclass(frozen=True)
class Dataset:
    """Pictures of one split.

    Attributes:
        images: uint8 [count, side, side, channels]; a memory map where they come from disk.
        flip: Whether mirror images belong to the data.
        report: What was read.
        known_digest: The digest if it is known. Otherwise `digest` computes it.
    """

    images: UInt8Array
    flip: bool
    report: Report
    known_digest: str = ""
    _file: _File | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        mapped = isinstance(self.images, np.memmap) and self.images.filename and len(self.images)
        file = _File(self.images) if mapped and self.images[0].flags.c_contiguous else None
        object.__setattr__(self, "_file", file)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """The digest of the pictures in their order, hexadecimal."""
        if self.known_digest:
            return self.known_digest
        digest = hashlib.blake2b(digest_size=16)
        for at in range(0, len(self), 1000):
            digest.update(np.ascontiguousarray(self.images[at : at + 1000]).data)
        return digest.hexdigest()

    def rows(self, indices: IndexArray) -> UInt8Array:
        """Return the pictures at `indices`.

        Raises:
            DataError: their file can no longer be read.
        """
        return self._file.rows(indices) if self._file else self.images[indices]

    def batch(self, indices: IndexArray, rng: np.random.Generator) -> UInt8Array:
        """Return the pictures at `indices`; with flips, each is mirrored with probability 1/2."""
        images = self.rows(indices)
        if self.flip:
            mirrored = rng.random(len(images)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        return images


@dataclass(frozen=True)
class Splits:
    """The pictures by split; a split that the source does not have is None."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None


def load_data(
    path: Path,
    recipe: Recipe,
    *,
    skip_unreadable: bool = False,
    cache: Path | None = None,
    advance: Advance | None = None,
) -> Splits:
    """Return the pictures that a path holds.

    A path is a folder (recursive) or a zip of pictures of any format and size, CelebA as downloaded with its
    official split, CIFAR-10's binary files, IDX files, a .npy or a .npz. Arrays that the recipe does not change are
    mapped where they are. All else is decoded once, stored in the cache, and mapped from there.

    Args:
        path: The folder or file.
        recipe: Its side, channels, crop, resize and flip are used; `limit` cuts the train pictures,
            then `validation` takes its share of them, added to the official validation split if there is one.
        skip_unreadable: Leave broken pictures out.
        cache: The folder for decoded pictures; None means the user's cache folder.
        advance: Is called with (done, total) while files are read to look them up in the cache, and again while
            those that are not there are decoded.

    Raises:
        DataError: there are no pictures, none can be read, or one is broken and `skip_unreadable` is not set.
    """
    kept = Cache(cache or default_folder())
    with opened(path, recipe, kept, advance) as source, warnings.catch_warnings():
        # Pillow warns between its own two pixel limits; ours is lower and an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        ready = source.stored_arrays()
        stored = Stored(ready, _digests(ready, kept), []) if ready else _stored(source, recipe, kept, advance)
    counts = {split: len(images) for split, images in stored.images.items()}
    broken = [(str(path / name), reason) for name, reason in stored.broken]
    report = Report(sum(counts.values()), source.ignored, broken, source.kind, counts)
    _check(path, report, skip_unreadable)
    train, validation, test = (
        Dataset(stored.images[split], recipe.flip, report, stored.digests.get(split, ""))
        if split in stored.images
        else None
        for split in SPLITS
    )
    assert train is not None  # it was checked
    return Splits(train, validation, test)


def _check(path: Path, report: Report, skip_unreadable: bool) -> None:
    if report.broken and not (skip_unreadable and report.read):
        name, reason = report.broken[0]
        more = f" ({len(report.broken) - 1} more are broken)" if len(report.broken) > 1 else ""
        remedy = "nothing else is left to train on" if skip_unreadable else "mend it, or pass --skip-unreadable"
        raise DataError(f"cannot read {name}: {reason}{more}; {remedy}")
    if report.counts.get("train", 0) < 2:
        raise DataError(f"training takes 2 pictures or more. Received: {path} with {report}")


def _digests(images: dict[str, UInt8Array], cache: Cache) -> dict[str, str]:
    """Return the digests of files that are mapped where they are. They are remembered, as the files can be large."""
    return {
        split: cache.digest(Path(part.filename), part.offset, part.nbytes)
        for split, part in images.items()
        if isinstance(part, np.memmap) and part.filename
    }


def _stored(source: PictureSource, recipe: Recipe, cache: Cache, advance: Advance | None) -> Stored:
    shape = (recipe.side, recipe.side, recipe.channels)
    how = f"{FORMAT} {shape} {recipe.crop} {recipe.resize} {recipe.limit} {recipe.validation}"
    key = hashlib.blake2b(f"{how}\n{source.identity()}".encode(), digest_size=16).hexdigest()
    return store.fetch(cache, key, shape) or store.build(cache, key, shape, _pictures(source, recipe, advance))


def _pictures(
    source: PictureSource, recipe: Recipe, advance: Advance | None
) -> Iterator[tuple[int, UInt8Array | tuple[str, str]]]:
    """Yield (split, picture) in the order of SPLITS; (split, (name, reason)) if a picture cannot be read."""
    splits = source.splits.copy()
    if recipe.validation:
        train = np.flatnonzero(splits == 0)
        held = in_parallel(lambda index: held_back(source.fingerprint(index), recipe.validation), train.tolist())
        splits[train[np.fromiter(held, bool, len(train))]] = 1

    def read(index: int) -> tuple[int, UInt8Array | tuple[str, str]]:
        try:
            return int(splits[index]), source.picture(index)
        except Exception as error:  # decoders raise almost anything on broken bytes
            ours = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            if ours and source.fingerprint(index) != UNREADABLE:  # it may be whole: do not store that it is broken
                raise DataError(f"cannot read {source.label(index)}: {why(error)}") from None
            return int(splits[index]), (source.label(index), why(error))

    return in_parallel(read, np.argsort(splits, kind="stable").tolist(), advance)


def held_back(fingerprint: bytes, share: float) -> bool:
    """Tell whether a picture is held back for validation. Its fingerprint alone decides, and not the other pictures."""
    digest = hashlib.blake2b(fingerprint, digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little") < share * 2**64
