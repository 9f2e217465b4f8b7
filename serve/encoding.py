"""Pixels to files, and pictures of many pictures."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from serve.engine import Images

# The endings, and what Pillow is told. Everything is at, or beyond, visible exactness.
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 4},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 2},
}
ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


def encode(image: Images, kind: str) -> bytes:
    """Return an image [h, w, c] as a file's bytes; `kind` is one of FORMATS."""
    file = io.BytesIO()
    picture(image).save(file, **FORMATS[kind])
    return file.getvalue()


def picture(image: Images) -> Image.Image:
    """Return an image [h, w, c] as a Pillow image, grey where c is 1."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def contact_sheet(images: Images, columns: int, margin: int = 2) -> Image.Image:
    """Return images [n, h, w, c] as one picture, in rows, white between them."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = margin + row * (height + margin), margin + column * (width + margin)
        sheet[top : top + height, left : left + width] = image
    return picture(sheet)
