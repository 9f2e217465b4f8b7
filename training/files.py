"""Write files so that after a crash or a power cut each is the old one or the new one, never half of one."""

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
    """Yield a temporary path beside `path`. When the block ends well, what was written there replaces `path`.

    Raises:
        WriteError: the file cannot be written; the old one stays.
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
    """Rename a written file to its final name. After a power cut that name holds the old file or the new one, whole.

    Once this returns it holds the new one, so whatever the file supersedes may be deleted.
    """
    sync(part)  # else the name could be there without the bytes
    os.replace(part, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, in the place of the old file."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def append_line(path: Path, text: str) -> None:
    """Add a line to a file. Once this returns, a power cut cannot lose it.

    Raises:
        WriteError: the file cannot be written.
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
    """Make a folder and its missing parents, so that a power cut cannot lose them."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder, and need not
            raise
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """Turn an OSError about `path`, its folders, or `also` into one line that says `path` cannot be written.

    Raises:
        WriteError: the block raised an OSError that names one of these, or no file at all, as that of a full disk does.
            An OSError about any other file is raised as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) not in (path, *path.parents, *also):
            raise
        raise WriteError(f"cannot write to {path}: {(error.strerror or str(error)).lower()}") from None
