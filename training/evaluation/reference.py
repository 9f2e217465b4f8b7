"""The reference: real pictures to measure against, and their cached statistics.

The name of a cached file has all that its content depends on: the pictures, the extractor, the count. So it is never
out of date; a damaged file is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
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

UNSEEN = 2000  # pictures at most that were held back, to tell copies by
LEAST_UNSEEN = 10  # with fewer, any two models look alike

Through = Callable[[Iterable[UInt8Array]], Iterable[UInt8Array]]


@dataclass(frozen=True)
class Reference:
    """Real pictures to measure against, spread evenly over a split.

    Attributes:
        images: The whole split, uint8 [n, side, side, channels]; may be a memory map.
        chosen: Indices of the pictures of the reference, in rising order.
        card: What every record says of the reference: the data's digest, the split, counts, how pictures were read.
        more: What to do for more pictures.
        mirrored: Whether their mirror images are meant.
    """

    images: UInt8Array
    chosen: IndexArray
    card: dict[str, Any]
    more: str = "bring more pictures"
    mirrored: bool = False

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: int) -> UInt8Array:
        """Return a picture of the reference, uint8 [side, side, channels]."""
        return self._turned(self.images[self.chosen[at]])

    def batches(self, size: int) -> Iterator[UInt8Array]:
        """Yield the pictures, `size` at a time."""
        for at in range(0, len(self), size):
            yield self._turned(self.images[self.chosen[at : at + size]])

    def mirror(self) -> Reference:
        """Return the mirror images of the pictures."""
        return replace(self, mirrored=not self.mirrored, card={**self.card, "data": f"{self.card['data']}-mirrored"})

    def _turned(self, images: UInt8Array) -> UInt8Array:
        return np.asarray(images[..., ::-1, :] if self.mirrored else images)


def choose(splits: Splits, split: str, count: int, recipe: Recipe) -> Reference:
    """Return a reference of `count` pictures of a split, or of all if it has fewer.

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
    remedies = ["raise --count"] if count <= total else []
    if count >= total:
        settings = applied(recipe) if split != "test" else ""
        remedies.append(f"measure against another --split ({settings})" if settings else "bring more pictures")
    return Reference(dataset.images, np.arange(taken) * total // taken, card, " and ".join(remedies))


def held_back(splits: Splits, split: str, recipe: Recipe, trained_on: str) -> tuple[Reference | None, str]:
    """Return pictures that training never saw, for a reference that it did see; or None, and why there are none.

    Args:
        splits: The pictures.
        split: That of the reference.
        recipe: It has read them.
        trained_on: The digest of the pictures that training saw.
    """
    if why_not := not_trained_on(splits, split, trained_on):
        return None, why_not
    for name in ("validation", "test"):
        dataset: Dataset | None = getattr(splits, name)
        if dataset is not None and len(dataset) >= LEAST_UNSEEN:
            return choose(splits, name, UNSEEN, recipe), ""
    return None, (
        f"it takes {LEAST_UNSEEN} or more pictures that were held back from training; train-vae --set validation=0.1 "
        "holds back a tenth"
    )


def not_trained_on(splits: Splits, split: str, trained_on: str) -> str:
    """Return why a split is not of the pictures that training saw; empty if it is."""
    if split != "train":
        return "it compares with the pictures of training, --split train"
    return "" if splits.train.digest == trained_on else "--data holds other pictures than training saw"


def applied(recipe: Recipe) -> str:
    """Return the settings by which a recipe leaves pictures out of a split, and what they do; empty if none does."""
    parts = []
    if recipe.limit:
        parts.append(f"limit={recipe.limit} takes the first {recipe.limit:,} of train")
    if recipe.validation:
        parts.append(f"validation={recipe.validation:g} moves that share of them from train to validation")
    return ", ".join(parts)


def pictures_of(card: Card, split: bool = False) -> Recipe:
    """Return a recipe that reads pictures as the bundle's own did, and on request splits them so.

    Its other settings are without meaning.
    """
    height, _, channels = card.image_shape
    keys = ("crop", "resize", *(("limit", "validation", "flip") if split else ()))
    known = {key: card.recipe[key] for key in keys if key in card.recipe}
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
    return Recipe(card.name, side=height, channels=channels, **known)


def statistics(
    reference: Reference, extractor: Extractor, cache: Path | None, batch: int, through: Through
) -> Statistics:
    """Return the statistics of the reference, from the cache, or computed and then cached.

    Args:
        reference: The pictures.
        extractor: Computes their features.
        cache: The cache folder; its subfolder "reference" is used. None means the user's cache folder.
        batch: Pictures in a batch.
        through: Wraps the batches, with a progress bar for example.

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
    """Return the cached statistics; None if there are none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance, features = (arrays[name] for name in ("mean", "covariance", "features"))
    except Exception:  # there is no file, or zipfile, zlib or numpy raise their own on broken bytes
        return None
    shapes = (mean.shape, covariance.shape, features.shape)
    whole = shapes == ((size,), (size, size), (count, size)) and features.dtype == np.float32
    return Statistics(count, mean, covariance, features) if whole else None
