"""The pictures measured against, and the cache of what is known of them.

A cached file's name is made of what it follows from - the pictures, the extractor, the count - so nothing in it
goes stale, and a damaged one is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.card import Card
from training.data.cache import Cache, default_folder
from training.data.dataset import Dataset, Splits
from training.data.splits import SPLITS
from training.errors import DataError
from training.evaluation.extractors import Extractor
from training.evaluation.statistics import Statistics, collect
from training.recipe import Recipe
from training.types import IndexArray, UInt8Array

Through = Callable[[Iterable[UInt8Array]], Iterable[UInt8Array]]


@dataclass(frozen=True)
class Reference:
    """Pictures of a split, evenly spread over it.

    Attributes:
        images: The whole split, uint8 [n, side, side, channels]; may be on disk.
        chosen: Indices of the pictures measured against, rising.
        card: What goes beside every figure: the data's digest, the split, counts, how pictures were read.
    """

    images: UInt8Array
    chosen: IndexArray
    card: dict[str, Any]

    def __len__(self) -> int:
        return len(self.chosen)

    def batches(self, size: int) -> Iterator[UInt8Array]:
        """Yield the pictures, `size` at a time."""
        for at in range(0, len(self), size):
            yield np.asarray(self.images[self.chosen[at : at + size]])


def choose(splits: Splits, split: str, count: int, recipe: Recipe) -> Reference:
    """Return `count` pictures of a split, or all where it has fewer.

    Raises:
        DataError: the data has no such split.
    """
    dataset: Dataset | None = getattr(splits, split)
    if dataset is None:
        here = ", ".join(name for name in SPLITS if getattr(splits, name) is not None)
        raise DataError(f"--data holds no {split} pictures; pass --split with one of: {here}")
    total = len(dataset)
    taken = min(count, total)
    crop = f"crop {','.join(map(str, recipe.crop))}" if any(recipe.crop) else "largest centred square"
    card = {
        "data": dataset.digest,
        "split": split,
        "count": taken,
        "of": total,
        "read": f"{recipe.side}x{recipe.side}x{recipe.channels}, {crop}, {recipe.resize}",
    }
    return Reference(dataset.images, np.arange(taken) * total // taken, card)


def pictures_of(card: Card) -> Recipe:
    """Return a recipe that reads pictures as a bundle's did: all else in it means nothing."""
    height, _, channels = card.image_shape
    known = {key: card.recipe[key] for key in ("crop", "resize") if key in card.recipe}
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Recipe(card.name, side=height, channels=channels, **known)


def statistics(
    reference: Reference, extractor: Extractor, cache: Path | None, batch: int, through: Through
) -> Statistics:
    """Return what is known of the reference, from the cache or extracted now and cached.

    Args:
        reference: The pictures.
        extractor: Gives their features.
        cache: The folder whose part "reference" is looked in and written to; None takes the user's.
        batch: Pictures at a time.
        through: What batches pass on their way: a progress bar.

    Raises:
        DataError: the cache cannot be written.
    """
    kept = Cache((cache or default_folder()) / "reference")
    name = f"{reference.card['data']}-{extractor.digest}-{len(reference)}.npz"
    known = _read(kept.folder / name, len(reference), extractor.size)
    if known is None:
        known = collect(extractor, through(reference.batches(batch)))
        with kept.writing(name) as file:
            np.savez(file, mean=known.mean, covariance=known.covariance, features=known.features)
    return known


def _read(path: Path, count: int, size: int) -> Statistics | None:
    """Return the cached statistics, or None where there are none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance, features = (arrays[name] for name in ("mean", "covariance", "features"))
    except Exception:  # none there, or zipfile, zlib and numpy each with their own for broken bytes
        return None
    shapes = (mean.shape, covariance.shape, features.shape)
    whole = shapes == ((size,), (size, size), (count, size)) and features.dtype == np.float32
    return Statistics(count, mean, covariance, features) if whole else None
