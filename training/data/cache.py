"""A folder of results that can be computed again. It may be deleted at any time; damaged files are ignored."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from training.errors import DataError
from training.files import install, make_folder

DIGEST = 16  # bytes
PIECE = 2**22  # bytes read at a time
_STALE = 3600.0  # seconds without a write after which an unfinished file belongs to a killed process


def default_folder() -> Path:
    """Return the folder that is used without --cache, in the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balanced-vae"


class Cache:
    """Files that appear under their name only when they are whole. Constructing one touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def writing(self, name: str = "") -> Iterator[IO[bytes]]:
        """Yield a new file, open for writing and reading, which gets its name when the block ends well.

        Otherwise it is removed.

        Args:
            name: The file's name in the folder. Without one the file is removed in any case.

        Raises:
            DataError: the folder cannot be written to.
        """
        part = None
        try:
            make_folder(self.folder)
            self._sweep()
            with tempfile.NamedTemporaryFile("w+b", dir=self.folder, prefix=".part-", delete=False) as file:
                part = Path(file.name)
                yield file
                if name:
                    file.flush()
                    install(part, self.folder / name)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise DataError(
                f"cannot write to {self.folder}: {reason}; make room there, or choose another folder with --cache or "
                "XDG_CACHE_HOME"
            ) from None
        finally:
            if part:
                part.unlink(missing_ok=True)

    def remembered(
        self, about: str, compute: Callable[[], bytes], lasts: Callable[[bytes], bool] = lambda result: True
    ) -> bytes:
        """Return what `compute` returns, or what it returned for the same `about` before.

        Args:
            about: A text that changes whenever the result might.
            compute: Computes the result.
            lasts: Whether a result may be remembered.
        """
        name = f"{digest_of(about.encode()).hexdigest()}.note"
        with contextlib.suppress(OSError):
            data = (self.folder / name).read_bytes()
            if data[:DIGEST] == digest_of(data[DIGEST:]).digest():
                return data[DIGEST:]
        result = compute()
        if lasts(result):
            # A result that cannot be written is computed again the next time.
            with contextlib.suppress(DataError), self.writing(name) as file:
                file.write(digest_of(result).digest() + result)
        return result

    def digest(self, path: Path, offset: int = 0, length: int | None = None) -> str:
        """Return the digest of a part of a file. It is remembered as long as the file is not touched."""

        def compute() -> bytes:
            digest, left = digest_of(), path.stat().st_size if length is None else length
            with path.open("rb") as file:
                file.seek(offset)
                while piece := file.read(min(PIECE, left)):
                    digest.update(piece)
                    left -= len(piece)
            return digest.digest()

        return self.remembered(f"{state(path)} {offset} {length}", compute).hex()

    def _sweep(self) -> None:
        """Remove unfinished files that killed processes left."""
        for part in self.folder.glob(".part-*"):
            with contextlib.suppress(OSError):  # another process was faster
                if part.stat().st_mtime < time.time() - _STALE:
                    part.unlink()


def state(path: str | Path) -> str:
    """Return a text that changes whenever a file is written to."""
    facts = os.stat(path)
    return f"{os.path.abspath(path)!a} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def digest_of(data: bytes = b"") -> hashlib.blake2b:
    """Return the digest of some bytes, to which more can be added."""
    return hashlib.blake2b(data, digest_size=DIGEST)
