"""Pictures made ready once, then mapped into memory at every later start.

One file holds one source under one preprocessing, and is named by the digest of both: the pictures of
train, validation and test one after the other, uint8 [side, side, channels] each; a JSON object that says
how many, with their digests and what was broken; its length, its digest, and a magic word. It appears
under its name only when it is whole. A folder of such files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from training.data.images import SPLITS, Pixels
from training.errors import DataError
from training.record.files import install, make_folder

_TRAILER = struct.Struct("<Q16s8s")
_DIGEST = 16
_MAGIC = b"bvae-pix"
_SAMPLES, _BLOCK = 256, 2**14  # what is read of a file before it is believed: all of a small one
_STALE = 3600.0  # seconds without a write after which an unfinished file belongs to a killed process
_PIECE = 2**22  # bytes read at a time


def default_folder() -> Path:
    """Return where caches go unless --cache says otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balanced-vae"


@dataclass(frozen=True)
class Stored:
    """What a cache file holds.

    Attributes:
        images: Memory maps by split, uint8 [count, side, side, channels]; splits without pictures are left out.
        digests: Of each split's bytes: hexadecimal.
        broken: (name, reason) of pictures that could not be read.
    """

    images: dict[str, Pixels]
    digests: dict[str, str]
    broken: list[tuple[str, str]]


class Cache:
    """A folder of ready pictures. Constructing one touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, shape: tuple[int, ...]) -> Stored | None:
        """Return what is stored under a key; None where nothing is, or nothing that can be believed."""
        try:
            with self._path(key).open("rb") as file:
                size = file.seek(0, os.SEEK_END) - _TRAILER.size
                file.seek(size)
                length, digest, magic = _TRAILER.unpack(file.read())
                file.seek(size - length)
                text = file.read(length)
                if magic != _MAGIC or _digest(text).digest() != digest:
                    return None
                facts = json.loads(text)
                pixels = sum(facts["counts"].values()) * math.prod(shape)
                if size - length != pixels or _spot_check(file, pixels) != facts["spots"]:
                    return None
                images: dict[str, Pixels] = {}
                at = 0
                for split, count in facts["counts"].items():
                    images[split] = np.memmap(file, np.uint8, "r", offset=at, shape=(count, *shape))
                    at += images[split].nbytes
        except (OSError, ValueError, struct.error):
            return None
        return Stored(images, facts["digests"], [(name, reason) for name, reason in facts["broken"]])

    def build(
        self, key: str, shape: tuple[int, ...], pictures: Iterable[tuple[int, Pixels | tuple[str, str]]]
    ) -> Stored:
        """Store pictures as they come, and return them.

        Args:
            key: What they will be found under.
            shape: A picture's.
            pictures: (split, picture or its name and what is wrong with it), in the order of SPLITS.

        Raises:
            DataError: the folder cannot be written to; nothing is left there.
        """
        counts = dict.fromkeys(SPLITS, 0)
        digests = {split: _digest() for split in SPLITS}
        broken: list[tuple[str, str]] = []
        with self._writing() as file:
            for number, picture in pictures:
                if isinstance(picture, tuple):
                    broken.append(picture)
                    continue
                counts[SPLITS[number]] += 1
                digests[SPLITS[number]].update(data := picture.tobytes())
                file.write(data)
            file.flush()
            facts = {
                "counts": {split: count for split, count in counts.items() if count},
                "digests": {split: digests[split].hexdigest() for split, count in counts.items() if count},
                "broken": broken,
                "spots": _spot_check(file, sum(counts.values()) * math.prod(shape)),
            }
            text = json.dumps(facts).encode()
            file.write(text + _TRAILER.pack(len(text), _digest(text).digest(), _MAGIC))
            file.flush()
            install(Path(file.name), self._path(key))
        stored = self.get(key, shape)
        if stored is None:
            raise DataError(f"what was written to {self.folder} cannot be read again; choose another with --cache")
        return stored

    def unpacked(self, stream: IO[bytes], name: str, read: Callable[[Path], Pixels]) -> Pixels:
        """Return what `read` maps of a compressed file's content: a file without a name, gone with the map.

        Raises:
            DataError: the content is damaged, or the folder cannot be written to.
        """
        with self._writing() as file:
            for piece in _pieces(stream, name):
                file.write(piece)
            file.flush()
            return read(Path(file.name))

    def noted(
        self, about: str, compute: Callable[[], bytes], lasts: Callable[[bytes], bool] = lambda result: True
    ) -> bytes:
        """Return what `compute` gives, or what it gave when last asked about the same, if that `lasts`."""
        note = self.folder / f"{_digest(about.encode()).hexdigest()}.note"
        with contextlib.suppress(OSError):
            data = note.read_bytes()
            if data[:_DIGEST] == _digest(data[_DIGEST:]).digest():
                return data[_DIGEST:]
        result = compute()
        if not lasts(result):
            return result
        # Where it cannot be noted it is computed again next time.
        with contextlib.suppress(DataError), self._writing() as file:
            file.write(_digest(result).digest() + result)
            file.flush()
            install(Path(file.name), note)
        return result

    def digest(self, path: Path, offset: int = 0, length: int | None = None) -> str:
        """Return the digest of a part of a file: read once, then known as long as the file is not touched."""

        def compute() -> bytes:
            digest, left = _digest(), path.stat().st_size if length is None else length
            with path.open("rb") as file:
                file.seek(offset)
                while piece := file.read(min(_PIECE, left)):
                    digest.update(piece)
                    left -= len(piece)
            return digest.digest()

        return self.noted(f"{state(path)} {offset} {length}", compute).hex()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pictures"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """Give a new file, open for writing and reading; it is gone at the end unless it was renamed.

        Raises:
            DataError: it cannot be written.
        """
        name = None
        try:
            make_folder(self.folder)
            self._sweep()
            with tempfile.NamedTemporaryFile("w+b", dir=self.folder, prefix=".part-", delete=False) as file:
                name = Path(file.name)
                yield file
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(
                f"cannot write to {self.folder}: {reason}; make room there, or choose another folder with --cache"
            ) from None
        finally:
            if name:
                name.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for part in self.folder.glob(".part-*"):
            with contextlib.suppress(OSError):  # another process was faster
                if part.stat().st_mtime < time.time() - _STALE:
                    part.unlink()


def state(path: str | Path) -> str:
    """Return what changes whenever a file is written to."""
    facts = os.stat(path)
    return f"{os.path.abspath(path)!a} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def _digest(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=_DIGEST)


def _spot_check(file: IO[bytes], size: int) -> str:
    """Return a digest of blocks spread evenly over a file's first bytes."""
    digest = _digest()
    for at in np.linspace(0, max(size - _BLOCK, 0), _SAMPLES).astype(int).tolist():
        file.seek(at)
        digest.update(file.read(min(_BLOCK, size - at)))
    file.seek(size)
    return digest.hexdigest()


def _pieces(stream: IO[bytes], name: str) -> Iterator[bytes]:
    while True:
        try:
            piece = stream.read(_PIECE)
        except Exception as error:  # zlib, gzip and zipfile each have their own for broken bytes
            raise DataError(f"cannot read {name}: {error or type(error).__name__}") from None
        if not piece:
            return
        yield piece
