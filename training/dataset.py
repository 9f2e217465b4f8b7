"""Pictures to train on, read into memory as uint8 arrays. No Keras here: a bad folder is told at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.errors import DataError
from training.images import Report, is_picture, read_all
from training.recipes import Recipe

CIFAR_SIDE = 32
CIFAR_ROW = 1 + 3 * CIFAR_SIDE**2  # a label, then the red, green and blue planes


@dataclass(frozen=True)
class Dataset:
    """Pictures in memory.

    Attributes:
        images: uint8 [count, side, side, channels].
        flip: Whether mirror images belong to the data.
        report: What was read.
    """

    images: npt.NDArray[np.uint8]
    flip: bool
    report: Report

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Identity of the pictures, their order included: hexadecimal."""
        return hashlib.blake2b(np.ascontiguousarray(self.images).data, digest_size=16).hexdigest()

    def batch(self, indices: npt.NDArray[np.intp], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """Return the pictures at `indices`, each mirrored at even odds when flips belong to the data."""
        images = self.images[indices]
        if self.flip:
            mirrored = rng.random(len(images)) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        return images


def load(path: Path, recipe: Recipe, skip_unreadable: bool = False) -> Dataset:
    """Read a folder of pictures (recursively) or of CIFAR-10's binary files.

    Raises:
        DataError: nothing there, nothing readable, or - unless `skip_unreadable` - a broken picture.
    """
    if not path.is_dir():
        raise DataError(f"--data takes a folder of pictures. Received: {path}, which is not a folder")
    batches = sorted(path.rglob("data_batch_*.bin"))
    report = Report()
    images = _read_cifar10(batches, recipe, report) if batches else _read_folder(path, recipe, report)
    if report.broken and not (skip_unreadable and report.read):
        name, reason = report.broken[0]
        more = f" ({len(report.broken) - 1} more are broken)" if len(report.broken) > 1 else ""
        remedy = "nothing else is left to train on" if skip_unreadable else "mend it, or pass --skip-unreadable"
        raise DataError(f"cannot read {name}: {reason}{more}; {remedy}")
    if len(images) < 2:
        raise DataError(f"training takes 2 pictures or more. Received: {len(images)} in {path}")
    return Dataset(images, recipe.flip, report)


def _read_folder(path: Path, recipe: Recipe, report: Report) -> npt.NDArray[np.uint8]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    pictures = [file for file in files if is_picture(file)]
    report.ignored = len(files) - len(pictures)
    if not pictures:
        held = f"{len(files)} files, none a picture by its ending (.png, .jpg, .webp ...)" if files else "no files"
        raise DataError(f"--data takes a folder of pictures. Received: {path}, which holds {held}")
    read = read_all(pictures, recipe, report)
    return np.stack(read) if read else np.empty((0, recipe.side, recipe.side, recipe.channels), np.uint8)


def _read_cifar10(batches: list[Path], recipe: Recipe, report: Report) -> npt.NDArray[np.uint8]:
    if (recipe.side, recipe.channels) != (CIFAR_SIDE, 3):
        raise DataError(
            f"CIFAR-10's files hold 32x32 colour pictures; recipe {recipe.name} wants "
            f"{recipe.side}x{recipe.side} with {recipe.channels} channels: pass --recipe cifar10"
        )
    parts = []
    for file in batches:
        size = file.stat().st_size
        if not size or size % CIFAR_ROW:
            raise DataError(f"{file} is not a CIFAR-10 batch: {size} bytes is no multiple of {CIFAR_ROW}")
        rows = np.fromfile(file, np.uint8).reshape(-1, CIFAR_ROW)
        if rows[:, 0].max() > 9:
            raise DataError(f"{file} is not a CIFAR-10 batch: it holds a label above 9")
        parts.append(rows[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1))
    images = np.ascontiguousarray(np.concatenate(parts))
    report.read = len(images)
    return images
