"""Decode pictures, one by one, to arrays of the recipe's size.

A file of any format, size, mode or orientation becomes uint8 [side, side, channels], or one line that says why it
cannot be read.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import PurePath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from training.data.splits import Advance
from training.recipe import Recipe
from training.types import UInt8Array

with suppress(ImportError):  # the extra `heif`
    import_module("pillow_heif").register_heif_opener()

HEIC = (".heic", ".heif", ".hif")
SHEET = "balanced-vae sheet"  # what many pictures in one are marked with: the PNG's text "Software"
_MARK = b"tEXtSoftware\0" + SHEET.encode()
_HEAD = 512  # bytes of a PNG, in which its text is found: it comes before the pixels

MOST_PIXELS = 64_000_000  # a larger picture is a mistake or an attack: decoding it takes a gigabyte
MOST_BYTES = 256 * 2**20  # so is a larger file; a zip of a few bytes can unpack to gigabytes

# Documents, drawings and measurements, of which Pillow knows what they are; most take another program to be read.
NO_PICTURES = ("PDF", "MPEG", "EPS", "WMF", "HDF5", "GRIB", "BUFR")

_T = TypeVar("_T")
_R = TypeVar("_R")
_CHUNK = 16  # pictures that a thread takes at a time
_THREADS = min(32, (os.cpu_count() or 1) + 4)  # more than cores, as some wait for the disk


def why_no_picture(name: str) -> str:
    """Return why a file of this name is not read as a picture; empty if its ending is one of a format that is read."""
    path = PurePath(name)
    ending = path.suffix.lower()
    if any(part.startswith(".") and part != ".." for part in path.parts):  # or in a folder that is, as a trash is
        return "hidden"
    if ending in _endings():
        return ""
    if ending in HEIC:
        return "HEIC, which takes the extra heif (pip install pillow-heif)"
    return "no picture by the ending"


def sheet_mark() -> PngImagePlugin.PngInfo:
    """Return the text of a PNG that says that it is one of our sheets or figures, and not a picture to train on."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", SHEET)
    return text


def is_sheet(data: bytes) -> bool:
    """Tell whether a file's bytes are those of a PNG with that mark, written by train-vae or by sample-cli."""
    return _MARK in data[:_HEAD]


@cache
def _endings() -> set[str]:
    formats = Image.registered_extensions()
    return {ending for ending, name in formats.items() if name in Image.OPEN and name not in NO_PICTURES}


def in_parallel(work: Callable[[_T], _R], items: Sequence[_T], advance: Advance | None = None) -> Iterator[_R]:
    """Yield `work` of every item, in order. Threads do the work, a bounded number of items ahead of the consumer."""
    done = 0
    waiting: deque[Future[list[_R]]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for at in range(0, len(items) + 2 * _THREADS * _CHUNK, _CHUNK):
            if at < len(items):
                waiting.append(pool.submit(lambda part: [work(item) for item in part], items[at : at + _CHUNK]))
            if waiting and (at >= len(items) or len(waiting) == 2 * _THREADS):
                results = waiting.popleft().result()
                yield from results
                done += len(results)
                if advance:
                    advance(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)  # a consumer that stops early does not wait for the rest


def decode(data: bytes, recipe: Recipe) -> UInt8Array:
    """Return the picture in a file's bytes as the recipe says: uint8 [side, side, channels].

    Raises:
        Exception: the picture cannot be read. Decoders raise almost any exception on broken bytes; `why` describes it.
    """
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as picture:
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width}x{height} is over {MOST_PIXELS // 10**6} megapixels; shrink it first")
        return to_array(picture, recipe)


def why(error: Exception) -> str:
    """Return one line that says why a picture cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"over {MOST_PIXELS // 10**6} megapixels; shrink it first"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).strip().rstrip(".").splitlines()[0] if str(error).strip() else type(error).__name__


def box(width: int, height: int, recipe: Recipe) -> tuple[int, int, int, int]:
    """Return the part of a picture that the recipe crops: (left, top, right, bottom), in pixels.

    Raises:
        ValueError: the picture is smaller than the recipe's crop.
    """
    if any(recipe.crop):
        top, bottom, left, right = recipe.crop
        if bottom > height or right > width:
            raise ValueError(f"{width}x{height} is smaller than the recipe's crop (rows {top}-{bottom})")
        return left, top, right, bottom
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    return left, top, left + square, top + square


def to_array(picture: Image.Image, recipe: Recipe) -> UInt8Array:
    """Return the picture cropped and resized as the recipe says: uint8 [side, side, channels].

    Raises:
        ValueError: the picture is smaller than the recipe's crop.
    """
    picture = ImageOps.exif_transpose(picture)
    picture = _flatten(picture).convert("L" if recipe.channels == 1 else "RGB")
    picture = picture.crop(box(*picture.size, recipe))
    if picture.size != (recipe.side, recipe.side):
        picture = picture.resize((recipe.side, recipe.side), Image.Resampling[recipe.resize.upper()])
    return np.asarray(picture).reshape(recipe.side, recipe.side, recipe.channels)


def _flatten(picture: Image.Image) -> Image.Image:
    """Return the picture with 8 bits a channel and no transparency (laid on white)."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        # 16-bit greys arrive as I;16 or I; Pillow's own conversion would clip them at 255.
        top = 65535.0 if picture.mode != "F" else max(float(values.max(initial=0)), 1.0)
        return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(paper, picture)
    return picture
