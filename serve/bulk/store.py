"""Where files lie: a folder, or a prefix in an object store. A file is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from filelock import FileLock, Timeout

from serve.errors import JobError
from serve.text import one_line

LOCK = ".sample-cli.lock"
MANIFEST = "manifest.json"
# Half-written.
PART = re.compile(
    r"\.part-([0-9a-f]{8}-)?(\d{9,}[-.].+|\d{3}\.\w+|(way|temperatures)\.\w+|manifest\.json|grid\.png|README\.md)",
    re.ASCII,
)
CLAIM = 60.0  # seconds that one of several processes may take to say what a folder is for
URL = re.compile(r"([a-z][a-z0-9+.-]+)://")


class Store(Protocol):
    """Where a job's files are kept.

    Names are relative, with "/"; every method raises JobError, in one line, where the store cannot do it.
    """

    def __str__(self) -> str:
        """What the user called it."""

    def names(self, folder: str = "") -> set[str]:
        """Return the names of all files in one folder, which need not be there; with that folder, as everywhere."""

    def walk(self) -> Iterator[str]:
        """Yield the names of all files, in no order."""

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes; None where there is no such file."""

    def ends(self, name: str, size: int) -> tuple[bytes, bytes, int] | None:
        """Return so many of a file's first and last bytes, and its size; None where there is no such file."""

    def put(self, name: str, data: bytes, lasting: bool = True) -> None:
        """Write a file, or replace it.

        Args:
            name: The file.
            data: All of it.
            lasting: Whether it has to outlast a power cut.
        """

    def remove(self, name: str) -> None:
        """Remove a file, which need not be there."""

    def sweep(self) -> None:
        """Remove what was left half-written; nobody may be writing."""

    @contextmanager
    def hold(self, begin: Callable[[], None], worker: int | None = None) -> Iterator[None]:
        """Keep every other job out as long as the block lasts, where the store can.

        Args:
            begin: Called first, while no other process does the same.
            worker: The number of one of several processes that complete one job together; None where there is one.
        """


def open_store(place: str) -> Store:
    """Return the store at a path or URL.

    Raises:
        JobError: pyarrow, which knows such URLs, is not installed, or does not know this one; or it is a path's.
    """
    if place.startswith("file:"):
        raise JobError(f"a folder of this machine is named by its path alone. Received: {place}")
    return Remote(place) if URL.match(place) else Folder(Path(place))


class Folder:
    """A folder on a file system of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self, folder: str = "") -> set[str]:
        with self._trying("read"), suppress(FileNotFoundError):
            prefix = f"{folder}/" if folder else ""
            with os.scandir(self._path / folder) as entries:
                return {prefix + each.name for each in entries if not each.is_dir(follow_symlinks=False)}
        return set()

    def walk(self) -> Iterator[str]:
        with self._trying("read"):
            for folder, _, names in os.walk(self._path):
                inside = Path(folder).relative_to(self._path)
                yield from ((inside / name).as_posix() for name in names)

    def read(self, name: str) -> bytes | None:
        path = self._path / name
        with self._trying("read"):
            return path.read_bytes() if path.is_file() else None  # a pipe would be waited for

    def ends(self, name: str, size: int) -> tuple[bytes, bytes, int] | None:
        path = self._path / name
        try:
            if not path.is_file():
                return None
            with path.open("rb", buffering=0) as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(0, length - size))
                end = file.read(size)
                file.seek(0)
                return file.read(size), end, length
        except OSError:  # it cannot be read, so it is not there
            return None

    def put(self, name: str, data: bytes, lasting: bool = True) -> None:
        path = self._path / name
        part = path.with_name(f".part-{token_hex(4)}-{path.name}")
        with self._trying("write to"):
            try:
                try:
                    file = part.open("wb")
                except FileNotFoundError:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = part.open("wb")
                with file:
                    file.write(data)
                    if lasting:
                        file.flush()
                        os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        with self._trying("write to"):
            (self._path / name).unlink(missing_ok=True)

    @contextmanager
    def hold(self, begin: Callable[[], None], worker: int | None = None) -> Iterator[None]:
        """As `Store.hold`. The locks go with the process, however that ends.

        Several workers hold one lock each, and whoever is alone takes all of these: it removes what was left
        half-written.
        """
        with self._trying("write to"):
            self._path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if worker is None:
                self._lock(stack, LOCK)
                for path in self._path.glob(f"{LOCK}-*"):
                    self._lock(stack, path.name)
                begin()
                self.sweep()  # not before it is clear that the folder is ours
            else:
                with ExitStack() as first:
                    self._lock(first, LOCK, CLAIM)
                    self._lock(stack, f"{LOCK}-{worker}")
                    begin()
            yield

    def sweep(self) -> None:
        with self._trying("write to"):
            for folder, below, names in os.walk(self._path):
                below[:] = [each for each in below if not _is_held(Path(folder, each))]
                for name in filter(PART.fullmatch, names):
                    Path(folder, name).unlink(missing_ok=True)

    def _lock(self, stack: ExitStack, name: str, patience: float = 0.0) -> None:
        lock = FileLock(self._path / name, timeout=patience, fallback_to_soft=False)
        with self._trying("write to"):
            try:
                lock.acquire()
            except Timeout:
                raise JobError(
                    f"another sample-cli is writing to {self}; wait for it, or choose another --out"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                raise JobError(
                    f"cannot lock {self} ({error.strerror}): choose an --out on a file system that has locks"
                ) from None
        stack.callback(lock.release)

        def unlink() -> None:
            with suppress(OSError):  # a lock file that stays does no harm
                (self._path / name).unlink()

        stack.callback(unlink)

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JobError(
                f"cannot {what} {self}: {error.strerror or error}; mend that, and the same command completes it"
            ) from None


def is_passing(name: str) -> bool:
    """Tell whether a file is one that processes have while they run, or were killed with."""
    return name.startswith(LOCK) or bool(PART.fullmatch(name.rpartition("/")[2]))


def _is_held(folder: Path) -> bool:
    """Tell whether a folder within another is a job's own."""
    return (folder / MANIFEST).exists() or any(folder.glob(f"{LOCK}*"))


class Remote:
    """A prefix in an object store that pyarrow knows. It has no locks: two jobs may be there at once.

    An object is put at once. If that fails half-way, what may have been left is not whole, and made again.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            from pyarrow import fs
        except ImportError:
            raise JobError(f"{url} takes pip install '.[bulk]' in the checkout, or pyarrow") from None
        self._fs: Any = fs
        with self._trying("open"):
            self._system, path = fs.FileSystem.from_uri(url)
            self._path = path.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def names(self, folder: str = "") -> set[str]:
        return set(self._list(f"{self._path}/{folder}".rstrip("/"), recursive=False))

    def walk(self) -> Iterator[str]:
        return self._list(self._path, recursive=True)

    def read(self, name: str) -> bytes | None:
        with self._trying("read"):
            try:
                with self._system.open_input_stream(f"{self._path}/{name}") as file:
                    data: bytes = file.read()
                    return data
            except FileNotFoundError:
                return None

    def ends(self, name: str, size: int) -> tuple[bytes, bytes, int] | None:
        data = self.read(name)  # one request, where three would be needed
        return None if data is None else (data[:size], data[-size:], len(data))

    def put(self, name: str, data: bytes, lasting: bool = True) -> None:
        with self._trying("write to"), self._system.open_output_stream(f"{self._path}/{name}") as file:
            file.write(data)

    def remove(self, name: str) -> None:
        with self._trying("write to"), suppress(FileNotFoundError):
            self._system.delete_file(f"{self._path}/{name}")

    def sweep(self) -> None:
        pass  # an object is there once it is whole

    @contextmanager
    def hold(self, begin: Callable[[], None], worker: int | None = None) -> Iterator[None]:
        begin()
        yield

    def _list(self, path: str, recursive: bool) -> Iterator[str]:
        with self._trying("read"):
            found = self._system.get_file_info(self._fs.FileSelector(path, allow_not_found=True, recursive=recursive))
            for each in found:
                if each.is_file and each.size:
                    yield each.path.removeprefix(f"{self._path}/")

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # pyarrow's own are these, in its words
            raise JobError(
                f"cannot {what} {self._url}: {one_line(str(error), 200)}; mend that, and the same command completes it"
            ) from None
