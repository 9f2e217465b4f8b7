"""Encodes images as files, and puts many into a contact sheet."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from serve import png
from serve.model import Images

if TYPE_CHECKING:
    from PIL import Image

# What Pillow takes for each format that it writes. Losses, where there are any, cannot be seen.
PILLOW: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 1, "quality": 0},  # without loss, quality is effort
}
FORMATS = ("png", *PILLOW)
ENDS = 12  # bytes
SHEET = "balanced-vae sheet"  # the text "Software" of a contact sheet, by which train-vae knows it and leaves it out
ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


def encode(image: Images, kind: str) -> bytes:
    """Return an image [h, w, c] as a file's bytes; `kind` is one of FORMATS."""
    if kind == "png":
        return png.write(image)
    file = io.BytesIO()
    picture(image).save(file, **PILLOW[kind])
    return file.getvalue()


def whole(begin: bytes, end: bytes, size: int, kind: str) -> bool:
    """Tell whether a file that `encode` made is all there, by its first and last ENDS bytes and its size.

    A cut copy, a full disk and a power cut take a file's end, or leave zeros there. What lies between is not read.
    """
    if kind == "png":
        return begin.startswith(png.BEGIN) and end == png.END
    if kind == "jpeg":
        return begin.startswith(b"\xff\xd8\xff") and end.endswith(b"\xff\xd9")
    # WebP has no mark at its end, but says how long it is.
    length = int.from_bytes(begin[4:8], "little") + 8
    return begin.startswith(b"RIFF") and begin.endswith(b"WEBP") and length == size and any(end)


def picture(image: Images) -> Image.Image:
    """Return an image [h, w, c] as a Pillow image, grey where c is 1."""
    from PIL import Image  # a twentieth of the time to a first picture, and files in PNG do without

    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def pictures(images: Images) -> list[Image.Image]:
    """Return images [n, h, w, c] as Pillow images."""
    return [picture(image) for image in images]


def contact_sheet(images: Images, columns: int, margin: int = 2) -> bytes:
    """Return images [n, h, w, c] as one PNG's bytes, in rows, white between them."""
    return png.write(sheet(images, columns, margin), software=SHEET)


def sheet(images: Images, columns: int, margin: int = 2) -> Images:
    """Return images [n, h, w, c] as one image, in rows, white between them."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    large = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = margin + row * (height + margin), margin + column * (width + margin)
        large[top : top + height, left : left + width] = image
    return large


def animation(images: Images, seconds: float = 2.0) -> bytes:
    """Return images [n, h, w, c] as an animated WebP's bytes, to and fro for ever: so many seconds one way."""
    first, *rest = pictures(np.concatenate([images, images[-2:0:-1]]))
    file = io.BytesIO()
    each = max(20, round(1000 * seconds / len(images)))  # milliseconds
    first.save(file, **PILLOW["webp"], save_all=True, append_images=rest, duration=each, loop=0)
    return file.getvalue()
