"""Pictures stored as arrays: CIFAR-10's binary files, IDX files (MNIST and others), .npy and .npz."""

from __future__ import annotations

import gzip
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.data.cache import PIECE, Cache
from training.data.images import box, to_array, why
from training.data.splits import SPLITS
from training.errors import DataError
from training.recipe import Recipe
from training.recipes import RECIPES
from training.types import UInt8Array

CIFAR_SIDE = 32
CIFAR_ROW = 1 + 3 * CIFAR_SIDE**2  # a label, then the red, green and blue planes
IDX_NAME = re.compile(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?")
IDX_HEADER = struct.Struct(">IIII")  # magic, pictures, rows, columns
IDX_MAGIC = 0x0803  # unsigned bytes in three dimensions

# Names of the pictures in .npz files: those of Keras' data sets, MedMNIST and np.savez.
NPZ_NAMES = {
    "train": ("images", "x_train", "train_images", "arr_0"),
    "validation": ("x_val", "val_images"),
    "test": ("x_test", "test_images"),
}


class Arrays:
    """A picture source with one array for each split.

    Args:
        kind: The format's name.
        files: The files that hold the arrays.
        read: Returns the arrays by split, uint8 [count, height, width, channels].
        recipe: How the pictures are cropped and resized.
        cache: Remembers the digests of large files.
        packed: Whether the files are compressed.
    """

    def __init__(
        self,
        kind: str,
        files: list[Path],
        read: Callable[[], dict[str, UInt8Array]],
        recipe: Recipe,
        cache: Cache,
        packed: bool = False,
    ) -> None:
        self.kind, self.files, self.recipe, self.cache, self.packed = kind, files, recipe, cache, packed
        self.ignored: list[tuple[str, str]] = []
        self._read = read

    @cached_property
    def _parts(self) -> dict[str, UInt8Array]:
        parts = self._read()
        if self.recipe.limit:
            parts["train"] = parts["train"][: self.recipe.limit]
        for part in parts.values():
            if part.shape[1:3] != (self.recipe.side, self.recipe.side):
                try:
                    box(part.shape[2], part.shape[1], self.recipe)
                except ValueError as error:
                    raise DataError(f"cannot use {self.files[0]}: {error}") from None
        return parts

    @cached_property
    def splits(self) -> UInt8Array:
        """The official split of each picture, as an index into SPLITS: uint8 [count]."""
        return np.repeat(np.arange(len(SPLITS), dtype=np.uint8), [len(self._parts.get(split, ())) for split in SPLITS])

    def stored_arrays(self) -> dict[str, UInt8Array] | None:
        """Return the stored arrays by split if the recipe uses them unchanged; else None."""
        if self.packed or self.recipe.validation:
            return None
        wanted = (self.recipe.side, self.recipe.side, self.recipe.channels)
        fit = all(part.shape[1:] == wanted and part.flags.c_contiguous for part in self._parts.values())
        return self._parts if fit else None

    def identity(self) -> str:
        """Return a text that changes whenever a file's name or bytes do."""
        return "\n".join([self.kind, *(f"{file.name!a} {self.cache.digest(file)}" for file in self.files)])

    def label(self, index: int) -> str:
        """Return a picture's name."""
        return f"number {index}"

    def fingerprint(self, index: int) -> bytes:
        """Return a picture's bytes."""
        return self._row(index).tobytes()

    def size(self, index: int) -> tuple[int, int]:
        """Return the width and height of a picture as it is stored."""
        row = self._row(index)
        return row.shape[1], row.shape[0]

    def picture(self, index: int) -> UInt8Array:
        """Return a picture as uint8 [side, side, channels]. One that has this shape already is not cropped."""
        row = self._row(index)
        if row.shape == (self.recipe.side, self.recipe.side, self.recipe.channels):
            return row
        return to_array(Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row), self.recipe)

    def _row(self, index: int) -> UInt8Array:
        for part in (self._parts[split] for split in SPLITS if split in self._parts):
            if index < len(part):
                return np.asarray(part[index])
            index -= len(part)
        raise IndexError(index)


def find(path: Path, names: list[str], recipe: Recipe, cache: Cache) -> Arrays | None:
    """Return the arrays that a file, or a folder with files of these names, holds; None if it holds something else.

    Raises:
        DataError: the arrays are damaged, or not pictures.
    """
    if path.suffix.lower() == ".npy":
        return Arrays(".npy", [path], lambda: {"train": _npy(path, str(path))}, recipe, cache)
    if path.suffix.lower() == ".npz":
        return Arrays(".npz", [path], lambda: _npz(path, cache), recipe, cache, packed=True)
    files = [path / name for name in sorted(names)]
    if batches := [file for file in files if re.fullmatch(r"data_batch_.*\.bin", file.name)]:
        return _cifar10(batches, [file for file in files if file.name == "test_batch.bin"], recipe, cache)
    if any(match and match[1] == "train" for match in (IDX_NAME.fullmatch(file.name) for file in files)):
        return _idx(path, files, recipe, cache)
    return None


def _cifar10(batches: list[Path], tests: list[Path], recipe: Recipe, cache: Cache) -> Arrays:
    if (recipe.side, recipe.channels) != (CIFAR_SIDE, 3):
        counterpart = recipe.name.replace("celeba", "cifar10")
        if "cifar10" not in counterpart or counterpart not in RECIPES:
            counterpart = "cifar10"
        raise DataError(
            f"CIFAR-10's files hold 32x32 colour pictures; recipe {recipe.name} wants {recipe.side}x{recipe.side} with "
            f"{recipe.channels} channels: pass --recipe {counterpart}"
        )

    def read() -> dict[str, UInt8Array]:
        splits = {"train": batches, "test": tests}
        return {split: np.concatenate([_batch(file) for file in files]) for split, files in splits.items() if files}

    return Arrays("CIFAR-10", batches + tests, read, recipe, cache)


def _batch(file: Path) -> UInt8Array:
    size = file.stat().st_size
    if not size or size % CIFAR_ROW:
        raise DataError(f"{file} is not a CIFAR-10 batch: {size} bytes is no multiple of {CIFAR_ROW}")
    rows = np.fromfile(file, np.uint8).reshape(-1, CIFAR_ROW)
    if rows[:, 0].max() > 9:
        raise DataError(f"{file} is not a CIFAR-10 batch: it holds a label above 9")
    return np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1))


def _idx(path: Path, files: list[Path], recipe: Recipe, cache: Cache) -> Arrays:
    found: dict[str, Path] = {}
    for file in reversed(files):  # the unpacked one of two wins: its name is the shorter
        if match := IDX_NAME.fullmatch(file.name):
            found["train" if match[1] == "train" else "test"] = file
    folders = sorted({str(file.parent) for file in files if IDX_NAME.fullmatch(file.name)})
    if len(folders) > 1:
        raise DataError(f"{path} holds more than one set of IDX files: pass {folders[0]} or another")
    splits = {split: found[split] for split in SPLITS if split in found}

    def read() -> dict[str, UInt8Array]:
        return {split: _idx_file(file, cache) for split, file in splits.items()}

    packed = any(file.suffix == ".gz" for file in splits.values())
    return Arrays("IDX", list(splits.values()), read, recipe, cache, packed)


def _idx_file(file: Path, cache: Cache) -> UInt8Array:
    if file.suffix != ".gz":
        return _idx_map(file, file)
    with gzip.open(file) as stream:
        return _unpacked(cache, cast(IO[bytes], stream), str(file), lambda part: _idx_map(part, file))


def _idx_map(part: Path, file: Path) -> UInt8Array:
    size = part.stat().st_size
    with part.open("rb") as stream:
        header = stream.read(IDX_HEADER.size)
    magic, count, height, width = IDX_HEADER.unpack(header) if len(header) == IDX_HEADER.size else (0, 0, 0, 0)
    if magic != IDX_MAGIC or not count * height * width:
        raise DataError(f"{file} is not an IDX file of pictures: it begins with {header.hex() or 'nothing'}")
    if size != IDX_HEADER.size + count * height * width:
        raise DataError(f"{file} is not whole: {size} bytes do not make {count} pictures of {width}x{height}")
    return np.memmap(part, np.uint8, "r", IDX_HEADER.size, (count, height, width, 1))


def _npy(part: Path, name: str) -> UInt8Array:
    """Map the array of pictures in the file `part`; `name` is what errors call it."""
    wanted = "pictures are uint8 [count, height, width] or [count, height, width, 1, 3 or 4 channels]"
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(part, mode="r")  # cannot unpickle, unlike np.load
    except Exception as error:  # headers are Python literals: there are many ways to break one
        raise DataError(f"cannot read {name}: {str(error).splitlines()[0].rstrip('.')}; {wanted}") from None
    channels = array.shape[3] if array.ndim == 4 else 1
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels not in (1, 3, 4) or not array.size:
        remedy = "; scale floats to 0-255 and round them" if array.dtype.kind == "f" else ""
        raise DataError(f"cannot use {name}: {wanted}{remedy}. Received: {array.dtype} {list(array.shape)}")
    return array if array.ndim == 4 else array[..., None]


@contextmanager
def archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip that many threads can read.

    Raises:
        DataError: the file is not a zip, or damaged.
    """
    with path.open("rb") as file:  # zipfile is only safe for threads with a file that it did not open itself
        try:
            opened = zipfile.ZipFile(file)
        except Exception as error:  # broken directories raise more than BadZipFile
            raise DataError(f"cannot read {path}: {why(error)}") from None
        with opened:
            yield opened


def _npz(path: Path, cache: Cache) -> dict[str, UInt8Array]:
    with archive(path) as members:
        held = [name.removesuffix(".npy") for name in members.namelist() if name.endswith(".npy")]
        if len(held) == 1:
            return {"train": _member(members, held[0], path, cache)}
        names = {split: [name for name in known if name in held] for split, known in NPZ_NAMES.items()}
        if not names["train"]:
            listed = ", ".join(held[:5])
            raise DataError(f"{path} holds {len(held)} arrays ({listed}): call the one of pictures 'images'")
        return {split: _member(members, found[0], path, cache) for split, found in names.items() if found}


def _member(members: zipfile.ZipFile, name: str, path: Path, cache: Cache) -> UInt8Array:
    label = f"{path}/{name}"
    try:
        stream = members.open(f"{name}.npy")
    except Exception as error:  # encrypted, or packed in a way that zipfile does not know
        raise DataError(f"cannot read {label}: {why(error)}") from None
    with stream:
        return _unpacked(cache, stream, label, lambda part: _npy(part, label))


def _unpacked(cache: Cache, stream: IO[bytes], name: str, read: Callable[[Path], UInt8Array]) -> UInt8Array:
    """Unpack a stream to a file, and return what `read` maps of it. The file is removed; the map keeps its content.

    Raises:
        DataError: the content is damaged, or the folder cannot be written to.
    """
    with cache.writing() as file:
        while piece := _piece(stream, name):
            file.write(piece)
        file.flush()
        return read(Path(file.name))


def _piece(stream: IO[bytes], name: str) -> bytes:
    try:
        return stream.read(PIECE)
    except Exception as error:  # zlib, gzip and zipfile each have their own for broken bytes
        raise DataError(f"cannot read {name}: {error or type(error).__name__}") from None
