"""Pictures of any kind, one by one, to arrays of the recipe's size.

Whatever a folder holds - any format, size, mode or orientation - comes out as uint8
[side, side, channels], or as one line that says which file cannot be read and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from training.recipes import Recipe

MOST_PIXELS = 64_000_000  # a larger picture is a mistake or an attack: decoding it takes a gigabyte

Pixels = npt.NDArray[np.uint8]


@dataclass
class Report:
    """What was read from a folder, and what was not.

    Attributes:
        read: Pictures read.
        ignored: Files that do not look like pictures by their name.
        broken: (path, reason) of pictures that could not be read.
    """

    read: int = 0
    ignored: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def is_picture(path: Path) -> bool:
    """Tell whether the file's ending is one of a format that Pillow reads."""
    return path.suffix.lower() in _endings() and not path.name.startswith(".")


def _endings() -> set[str]:
    formats = Image.registered_extensions()
    return {ending for ending, name in formats.items() if name in Image.OPEN and name not in ("PDF", "MPEG")}


def read_all(paths: Iterable[Path], recipe: Recipe, report: Report) -> list[Pixels]:
    """Read pictures in parallel, in order; what cannot be read goes into the report."""
    pictures = []
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        # Pillow warns between its own two pixel limits; ours is lower and an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for path, outcome in pool.map(lambda path: (path, _try_read(path, recipe)), paths):
            if isinstance(outcome, str):
                report.broken.append((str(path), outcome))
            else:
                pictures.append(outcome)
    report.read += len(pictures)
    return pictures


def _try_read(path: Path, recipe: Recipe) -> Pixels | str:
    """Return the picture, or why it cannot be read."""
    try:
        if not path.stat().st_size:
            return "the file is empty"
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                return f"{width}x{height} is over {MOST_PIXELS // 10**6} megapixels; shrink it first"
            return to_array(picture, recipe)
    except UnidentifiedImageError:
        return "not a picture that Pillow knows"
    except Image.DecompressionBombError:
        return f"over {MOST_PIXELS // 10**6} megapixels; shrink it first"
    # Decoders raise almost anything on broken bytes: SyntaxError (PNG), struct.error, ValueError, ...
    except Exception as error:
        return str(error).strip().rstrip(".").splitlines()[0] if str(error).strip() else type(error).__name__


def to_array(picture: Image.Image, recipe: Recipe) -> Pixels:
    """Return the picture cropped and resized as the recipe says: uint8 [side, side, channels].

    Raises:
        ValueError: the picture is smaller than the recipe's crop.
    """
    picture = ImageOps.exif_transpose(picture)
    picture = _flatten(picture).convert("L" if recipe.channels == 1 else "RGB")
    width, height = picture.size
    if any(recipe.crop):
        top, bottom, left, right = recipe.crop
        if bottom > height or right > width:
            raise ValueError(f"{width}x{height} is smaller than the recipe's crop (rows {top}-{bottom})")
        box = (left, top, right, bottom)
    else:
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        box = (left, top, left + square, top + square)
    picture = picture.crop(box)
    if picture.size != (recipe.side, recipe.side):
        method = Image.Resampling[recipe.resize.upper()]
        picture = picture.resize((recipe.side, recipe.side), method)
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
