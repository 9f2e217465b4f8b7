"""The sources that --data takes: a folder or a zip of picture files, CelebA as downloaded, or arrays.

A zip's pictures are read from the archive and never unpacked to disk; its other members are not read.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image

from training.data import arrays
from training.data.cache import Cache, state
from training.data.images import MOST_BYTES, decode, in_parallel, is_sheet, why, why_no_picture
from training.data.splits import Advance
from training.errors import DataError
from training.recipe import Recipe
from training.types import BoolArray, UInt8Array

CELEBA = "img_align_celeba"  # the folder of its pictures
WIDTH = 16  # bytes of a fingerprint
UNREADABLE = bytes(WIDTH)  # the fingerprint of a file that the system would not give
SHEET = 255  # every byte of the fingerprint of a sheet that we wrote ourselves
PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")  # its official split: picture, then 0, 1 or 2


class PictureSource(Protocol):
    """Numbered pictures; those of the train split are cut to the recipe's limit.

    Attributes:
        kind: The format, as in Report.
        ignored: (name, reason) of files that are not pictures to train on.
    """

    kind: str
    ignored: list[tuple[str, str]]

    @property
    def splits(self) -> UInt8Array:
        """The official split of each picture, as an index into SPLITS: uint8 [count]."""

    def stored_arrays(self) -> dict[str, UInt8Array] | None:
        """Return the stored arrays by split if the recipe uses them unchanged; else None."""

    def identity(self) -> str:
        """Return a text that changes whenever a name, a byte or a split does."""

    def label(self, index: int) -> str:
        """Return a picture's name in the source."""

    def fingerprint(self, index: int) -> bytes:
        """Return bytes that are equal for equal pictures, whatever their names."""

    def size(self, index: int) -> tuple[int, int]:
        """Return the width and height of a picture as it is stored. Any exception of a decoder may be raised."""

    def picture(self, index: int) -> UInt8Array:
        """Return a picture as uint8 [side, side, channels]. Any exception of a decoder may be raised."""


class _Folder:
    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.names = path, names

    def read(self, name: str) -> bytes:
        path = os.path.join(self.path, name)
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait forever
            raise ValueError("not a file")
        _check_size(facts.st_size)
        with open(path, "rb") as file:
            return file.read()

    def state(self, names: list[str]) -> str:
        lines = []
        for name in names:
            try:
                lines.append(state(os.path.join(self.path, name)))
            except OSError as error:
                lines.append(f"{name!a} {error}")
        return "\n".join(lines)


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.members = {member.filename: member for member in archive.infolist() if not member.is_dir()}
        self.names = list(self.members)

    def read(self, name: str) -> bytes:
        _check_size(self.members[name].file_size)
        return self.archive.read(self.members[name])  # zipfile reads no more bytes than the size that was checked

    def state(self, names: list[str]) -> str:
        return "\n".join([state(self.path), *map(ascii, names)])


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"the file is over {MOST_BYTES // 2**20} MB")


class _Files:
    """Picture files, in the order of their names."""

    def __init__(
        self, path: Path, container: _Folder | _Zip, recipe: Recipe, cache: Cache, advance: Advance | None
    ) -> None:
        every = sorted(container.names, key=lambda name: PurePosixPath(name).parts)
        reasons = {name: why_no_picture(name) for name in every}
        names = [name for name in every if not reasons[name]]
        self.path, self.container, self.recipe = path, container, recipe
        self.ignored = [(name, reason) for name, reason in reasons.items() if reason]
        if not names:
            raise DataError(f"there are no pictures in {path}, {_held(reasons)}")
        splits = np.zeros(len(names), np.uint8)
        self.kind = "pictures"
        if partition := self._partition(names):
            file, text = partition
            splits = parse_partition(file, text, names)
            self.kind = "CelebA"
        left, self.fingerprints = self._chosen(names, splits, cache, advance)
        self.names, self.splits = list(compress(names, left)), splits[left]

    def _chosen(
        self, names: list[str], splits: UInt8Array, cache: Cache, advance: Advance | None
    ) -> tuple[BoolArray, bytes]:
        """Return which pictures are within the recipe's limit and no sheets of ours, and their fingerprints."""
        limit = self.recipe.limit or len(names)
        sheets, kept = np.zeros((2, len(names)), bool)
        while True:
            now = (splits != 0) | (np.cumsum((splits == 0) & ~sheets) <= limit)
            if np.array_equal(now, kept):
                break
            kept = now
            prints = self._fingerprints(list(compress(names, kept)), cache, advance)
            sheets[kept] = (prints == SHEET).all(axis=1)  # each makes room for one more within the limit
        self.ignored += [(name, "made by sample-cli or train-vae") for name in compress(names, sheets)]
        return kept & ~sheets, prints[~sheets[kept]].tobytes()

    def _fingerprints(self, names: list[str], cache: Cache, advance: Advance | None) -> UInt8Array:
        """Return the files' fingerprints, uint8 [count, WIDTH], remembered until a file is touched: each is read."""
        prints = cache.remembered(
            self.container.state(names),
            lambda: b"".join(in_parallel(self._fingerprint, names, advance)),
            lasts=lambda prints: all(prints[at : at + WIDTH] != UNREADABLE for at in range(0, len(prints), WIDTH)),
        )
        return np.frombuffer(prints, np.uint8).reshape(-1, WIDTH)

    def _partition(self, names: list[str]) -> tuple[str, str] | None:
        """Find the file of the official split in the source, or beside CelebA's folder or zip: (path, text)."""
        for wanted in PARTITIONS:
            for name in self.container.names:
                if PurePosixPath(name).name == wanted:
                    self.ignored = [each for each in self.ignored if each[0] != name]
                    return str(self.path / name), _text(self.container, name)
            beside = self.path.resolve().parent / wanted
            if beside.is_file() and CELEBA in str(self.path.resolve() / names[0]):
                return str(beside), _text(_Folder(beside.parent, [wanted]), wanted)
        return None

    def _fingerprint(self, name: str) -> bytes:
        try:
            data = self.container.read(name)
            if is_sheet(data):
                return bytes([SHEET]) * WIDTH
        except OSError as error:
            if error.errno is not None:  # it may be readable the next time
                return UNREADABLE
            data = why(error).encode()
        except Exception as error:  # zipfile raises many on broken bytes; the reason replaces them
            data = why(error).encode()
        return hashlib.blake2b(data, digest_size=WIDTH).digest()

    def stored_arrays(self) -> None:
        """Return None: files have to be decoded."""

    def identity(self) -> str:
        rows = zip(self.names, self.splits.tolist(), strict=True)
        return "\n".join([self.fingerprints.hex(), *(f"{name!a} {split}" for name, split in rows)])

    def label(self, index: int) -> str:
        return self.names[index]

    def fingerprint(self, index: int) -> bytes:
        return self.fingerprints[index * WIDTH : (index + 1) * WIDTH]

    def size(self, index: int) -> tuple[int, int]:
        with Image.open(io.BytesIO(self.container.read(self.names[index]))) as picture:
            return picture.size

    def picture(self, index: int) -> UInt8Array:
        return decode(self.container.read(self.names[index]), self.recipe)


def _text(container: _Folder | _Zip, name: str) -> str:
    try:
        return container.read(name).decode("utf-8-sig", "replace")  # what does not decode as text fails as a line
    except Exception as error:
        raise DataError(f"cannot read {name}: {why(error)}") from None


def _held(reasons: dict[str, str]) -> str:
    if not reasons:
        return "which holds no files"
    zips = [name for name in reasons if name.lower().endswith((".zip", ".npy", ".npz"))]
    heic = next((f"; {name} is {reason}" for name, reason in reasons.items() if reason.startswith("HEIC")), "")
    hint = f"; pass {zips[0]} itself" if zips else heic
    return f"which holds {len(reasons)} files, none a picture by its ending (.png, .jpg, .webp ...){hint}"


def parse_partition(file: str, text: str, names: list[str]) -> UInt8Array:
    """Return the split of each picture as a partition file says: uint8 [count], an index into SPLITS.

    Lines are `000001.jpg 0`; a file ending in .csv has `000001.jpg,0` below the header image_id,partition.

    Raises:
        DataError: a line has another form or contradicts an earlier one, or a picture has no line.
    """
    comma = file.endswith(".csv")
    split_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = [word.strip() for word in line.split("," if comma else None)]
        if not any(words) or (comma and number == 1 and words == ["image_id", "partition"]):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            wanted = "a picture's name and 0 (train), 1 (validation) or 2 (test)"
            raise DataError(f"{file}, line {number}: expected {wanted}. Received: {line[:60]!r}")
        if split_of.setdefault(words[0], int(words[1])) != int(words[1]):
            raise DataError(f"{file}, line {number}: {words[0]} is in another split already")
    missing = [name for name in names if PurePosixPath(name).name not in split_of]
    if missing:
        share = "none" if len(missing) == len(names) else f"only {len(names) - len(missing):,}"
        raise DataError(
            f"{file} names {share} of the {len(names):,} pictures; the first that its {len(split_of):,} lines "
            f"lack is {missing[0]}. Remove it to train on all of them"
        )
    return np.array([split_of[PurePosixPath(name).name] for name in names], np.uint8)


@contextmanager
def opened(path: Path, recipe: Recipe, cache: Cache, advance: Advance | None) -> Iterator[PictureSource]:
    """Yield the source that a path holds.

    Raises:
        DataError: the path holds nothing that pictures can be read from.
    """
    takes = "--data takes a folder, a zip, .npy or .npz of pictures"
    if not path.exists():
        raise DataError(f"{takes}. Received: {path}, which does not exist")
    kind = path.suffix.lower()
    if not path.is_dir() and kind not in (".zip", ".npy", ".npz"):
        raise DataError(f"{takes}. Received: {path}, which is not a folder, zip, .npy or .npz")
    try:
        if kind == ".zip" and not path.is_dir():
            with arrays.archive(path) as archive:
                yield _Files(path, _Zip(path, archive), recipe, cache, advance)
            return
        names = [os.path.relpath(name, path) for name in _walk(path)] if path.is_dir() else []
        yield arrays.find(path, names, recipe, cache) or _Files(path, _Folder(path, names), recipe, cache, advance)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {why(error)}") from None


def _walk(path: Path) -> Iterator[str]:
    """Yield the paths of all files in a folder, and in those that it links to, each folder once.

    Raises:
        OSError: a folder cannot be looked at.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for folder, below, files in os.walk(path, onerror=fail, followlinks=True):
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            below.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        yield from (os.path.join(folder, name) for name in files)
