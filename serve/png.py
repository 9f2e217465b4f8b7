"""Pictures as PNG files, exactly: the standard's Paeth filter for every row, then zlib without a search for repeats.

What is left of a photograph once each value is predicted from its neighbours hardly ever repeats itself, so that
looking for what does takes most of an encoder's time and saves next to nothing. docs/operations.md has the figures.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from serve.model import Images

BEGIN = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"
GREY, COLOUR = 0, 2  # types of pictures
PAETH = 4  # the filter's number
BAND = 2**15  # values, or a row, that are filtered at a time: they stay in a processor's cache


def write(image: Images, software: str = "") -> bytes:
    """Return an image [h, w, c], grey where c is 1, as a PNG file's bytes.

    Args:
        image: The image.
        software: A text for the file, in Latin-1, under the standard's key "Software"; nothing where it is empty.
    """
    height, width, channels = image.shape
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, COLOUR if channels == 3 else GREY, 0, 0, 0])
    text = _chunk(b"tEXt", b"Software\0" + software.encode("latin-1")) if software else b""
    # Runs of one value are all the repeats that are looked for: plain areas are runs of zeros.
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    values = np.zeros((height + 1, (width + 1) * channels), np.int16)  # with what the filter takes to be outside
    values[1:, channels:] = image.reshape(height, width * channels)
    step = max(1, BAND // values.shape[1])
    parts = [packer.compress(_filtered(values[top : top + step + 1], channels).data) for top in range(0, height, step)]
    return BEGIN + _chunk(b"IHDR", header) + text + _chunk(b"IDAT", b"".join(parts) + packer.flush()) + END


def _filtered(values: npt.NDArray[np.int16], channels: int) -> npt.NDArray[np.uint8]:
    """Return all rows but the first as a PNG stores them: the filter's number, then each value less its prediction.

    The prediction is whichever of left, up and corner is next to left + up - corner; of equal ones, the first.
    """
    left, up, corner = values[1:, :-channels], values[:-1, channels:], values[:-1, :-channels]
    across, down = up - corner, left - corner
    from_left, from_up, from_corner = np.abs(across), np.abs(down), np.abs(across + down)
    is_left = from_left <= np.minimum(from_up, from_corner)
    is_up = (from_up <= from_corner) > is_left
    rows = np.empty((len(left), 1 + left.shape[1]), np.uint8)
    rows[:, 0] = PAETH
    # Products take a third of the time of a choice by np.where.
    prediction = corner + down * is_left + across * is_up
    np.subtract(values[1:, channels:], prediction, out=rows[:, 1:], casting="unsafe")
    return rows


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(data, zlib.crc32(kind)).to_bytes(4)
