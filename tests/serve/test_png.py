"""PNG files: whatever reads them sees the very picture, and they are as small as another encoder's."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from serve import Engine, load
from serve.encoding import contact_sheet, encode, picture
from serve.model import Images

DRAWN: dict[str, Callable[[tuple[int, int, int]], Images]] = {
    "noise": lambda shape: np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
    "extremes": lambda shape: np.random.default_rng(0).choice(np.array([0, 255], np.uint8), shape),
    "slopes": lambda shape: np.indices(shape).sum(0).astype(np.uint8),
    "white": lambda shape: np.full(shape, 255, np.uint8),
}


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 1), (9, 1, 3), (64, 64, 3), (700, 300, 1), (33, 12_000, 3)])
def test_a_reader_sees_the_very_picture(drawn: str, shape: tuple[int, int, int]) -> None:
    image = DRAWN[drawn](shape)
    file = encode(image, "png")
    Image.open(io.BytesIO(file)).verify()  # every checksum
    read = Image.open(io.BytesIO(file))
    assert read.mode == ("L" if shape[2] == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(read).reshape(shape), image)


def test_images_may_be_views() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for view in (images[::2, ::-1], images.transpose(1, 0, 2), np.broadcast_to(images[:1], (5, 30, 3))):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode(view, "png")))), view)


def test_files_are_as_small_as_pillows() -> None:
    faces = Engine(load(), "cpu").sample(seed=0, start=0, count=8)
    theirs = 0
    for face in faces:
        file = io.BytesIO()
        picture(face).save(file, "PNG")
        theirs += file.tell()
    assert sum(len(encode(face, "png")) for face in faces) < 1.02 * theirs


def test_a_sheet_says_what_made_it() -> None:
    sheet = Image.open(io.BytesIO(contact_sheet(np.zeros((3, 8, 8, 3), np.uint8), 2)))
    assert sheet.info["Software"] == "balanced-vae sheet"
    assert sheet.size == (2 * 10 + 2, 2 * 10 + 2)
