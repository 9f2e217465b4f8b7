"""Decoded pictures, stored once and mapped into memory at every later start.

One file holds one source under one preprocessing, and is named by the digest of both. It has the pictures of train,
validation and test one after the other, uint8 [side, side, channels] each; a JSON object with their counts, their
digests and the broken pictures; and that object's length and digest, and a magic word.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import numpy as np

from training.data.cache import DIGEST, Cache, digest_of
from training.data.splits import SPLITS
from training.errors import DataError
from training.types import UInt8Array

_TRAILER = struct.Struct(f"<Q{DIGEST}s8s")
_MAGIC = b"bvae-pix"
_SAMPLES, _BLOCK = 256, 2**14  # blocks, and bytes in one, that are checked before a file is used


@dataclass(frozen=True)
class Stored:
    """The content of a file of pictures.

    Attributes:
        images: Memory maps by split, uint8 [count, side, side, channels]; splits without pictures are left out.
        digests: Of each split's bytes: hexadecimal.
        broken: (name, reason) of pictures that could not be read.
    """

    images: dict[str, UInt8Array]
    digests: dict[str, str]
    broken: list[tuple[str, str]]


def fetch(cache: Cache, key: str, shape: tuple[int, ...]) -> Stored | None:
    """Return the pictures stored under a key; None if there are none, or if their file is damaged."""
    try:
        with (cache.folder / _name(key)).open("rb") as file:
            size = file.seek(0, os.SEEK_END) - _TRAILER.size
            file.seek(size)
            length, digest, magic = _TRAILER.unpack(file.read())
            file.seek(size - length)
            text = file.read(length)
            if magic != _MAGIC or digest_of(text).digest() != digest:
                return None
            facts = json.loads(text)
            pixels = sum(facts["counts"].values()) * math.prod(shape)
            if size - length != pixels or _spot_check(file, pixels) != facts["spots"]:
                return None
            images: dict[str, UInt8Array] = {}
            at = 0
            for split, count in facts["counts"].items():
                images[split] = np.memmap(file, np.uint8, "r", offset=at, shape=(count, *shape))
                at += images[split].nbytes
    except (OSError, ValueError, struct.error):
        return None
    return Stored(images, facts["digests"], [(name, reason) for name, reason in facts["broken"]])


def build(
    cache: Cache,
    key: str,
    shape: tuple[int, ...],
    pictures: Iterable[tuple[int, UInt8Array | tuple[str, str]]],
) -> Stored:
    """Store pictures as they come, and return them.

    Args:
        cache: The folder to store them in.
        key: The key that `fetch` finds them by.
        shape: The shape of one picture.
        pictures: (split, picture), or (split, (name, reason)) of a broken one, in the order of SPLITS.

    Raises:
        DataError: the folder cannot be written to; nothing is left there.
    """
    counts = dict.fromkeys(SPLITS, 0)
    digests = {split: digest_of() for split in SPLITS}
    broken: list[tuple[str, str]] = []
    with cache.writing(_name(key)) as file:
        for number, picture in pictures:
            if isinstance(picture, tuple):
                broken.append(picture)
                continue
            counts[SPLITS[number]] += 1
            digests[SPLITS[number]].update(data := picture.tobytes())
            file.write(data)
        facts = {
            "counts": {split: count for split, count in counts.items() if count},
            "digests": {split: digests[split].hexdigest() for split, count in counts.items() if count},
            "broken": broken,
            "spots": _spot_check(file, sum(counts.values()) * math.prod(shape)),
        }
        text = json.dumps(facts).encode()
        file.write(text + _TRAILER.pack(len(text), digest_of(text).digest(), _MAGIC))
    stored = fetch(cache, key, shape)
    if stored is None:
        raise DataError(f"what was written to {cache.folder} cannot be read again; choose another with --cache")
    return stored


def _name(key: str) -> str:
    return f"{key}.pictures"


def _spot_check(file: IO[bytes], size: int) -> str:
    """Return a digest of blocks spread evenly over a file's first `size` bytes, and seek to their end."""
    digest = digest_of()
    for at in np.linspace(0, max(size - _BLOCK, 0), _SAMPLES).astype(int).tolist():
        file.seek(at)
        digest.update(file.read(min(_BLOCK, size - at)))
    file.seek(size)
    return digest.hexdigest()
