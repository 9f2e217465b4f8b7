"""Files that are whole or not there, whatever ends the process or the machine."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import WriteError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes `path`'s place, for good, when all went well.

    Raises:
        WriteError: it cannot be written; what was there stays.
    """
    part = path.with_name(f".part-{path.name}")
    with writing(path, part):
        make_folder(path.parent)
        try:
            yield part
            install(part, path)
        finally:
            part.unlink(missing_ok=True)


def install(part: Path, path: Path) -> None:
    """Give a written file its name. After a power cut the name has the old file or the new one, whole.

    Once this returns it is the new one, so that what the file replaces may go.
    """
    sync(part)  # else the name could be there without the bytes
    os.replace(part, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as `replacing` does."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file. Once this returns a power cut cannot take it back.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path):
        fresh = not path.exists()
        with path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in, where they are not there, for good."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or which names a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems keep folders without being asked, and cannot be
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written, where the block fails at it, its folders, or `also`.

    Raises:
        WriteError: for an OSError that names no file, as a full disk's does, or one of these. Others pass.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) not in (path, *path.parents, *also):
            raise
        raise WriteError(f"cannot write to {path}: {(error.strerror or str(error)).lower()}") from None
