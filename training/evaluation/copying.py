"""Copying: whether a set of pictures is nearer to the training pictures than pictures are that training never saw.

The test of Meehan, Chaudhuri and Dasgupta (A Non-Parametric Test to Detect Data-Copying in Generative Models, 2020),
over all of the space at once: of a picture of the set and one that was held back, either drawn at random, how likely is
the former to be nearer to its nearest training picture? .5 for pictures as new as those held back, 1 for copies, and
less than .5 for pictures that are like no real ones. Where the training pictures are a part of all, copies of the
others count as new. Mirror images that were trained on are training pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors

from training.evaluation.reference import Reference
from training.record.grids import beside
from training.types import Float32Array, Float64Array, Record, UInt8Array

Pair = tuple[float, UInt8Array, int]  # a distance, a picture, and which of the training pictures is that near

PAIRS = 32  # that are drawn
THUMBNAIL = 16  # height and width of the pictures of which the pixels are compared


class Copying:
    """Compares sets of pictures with the training pictures, in features and in pixels.

    Args:
        seen_features: Those of training pictures, [n, f].
        seen_pixels: Their thumbnails, [n, values].
        unseen_features: Those of pictures that training never saw.
        unseen_pixels: Their thumbnails.
        card: What a record says of the latter.
    """

    def __init__(
        self,
        seen_features: Float32Array,
        seen_pixels: Float32Array,
        unseen_features: Float32Array,
        unseen_pixels: Float32Array,
        card: Record,
    ) -> None:
        self._features, self._pixels = _Space(seen_features, unseen_features), _Space(seen_pixels, unseen_pixels)
        self._card = card

    def __call__(self, features: Float32Array, pixels: Float32Array) -> Record:
        """Return what a record says of a set of pictures, by its features [n, f] and its thumbnails."""
        in_features, in_pixels = self._features(features), self._pixels(pixels)
        return {
            "copying": in_features.pop("share"),
            "copying_deviation": in_features.pop("deviation"),
            "copying_pixels": in_pixels.pop("share"),
            "copying_pixels_deviation": in_pixels.pop("deviation"),
            "copying_distances": {"features": in_features, "pixels": in_pixels},
            "unseen": self._card,
        }


class _Space:
    """The training pictures as points, and how far the unseen ones are from them."""

    def __init__(self, seen: Float32Array, unseen: Float32Array) -> None:
        self._seen = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(seen)
        self._unseen = self._distances(unseen)

    def __call__(self, points: Float32Array) -> dict[str, float]:
        """Return in how many pairs a point is nearer than an unseen one, its standard deviation, and median distances.

        A pair that is as near counts as half. The deviation is DeLong's, of both samples (DeLong et al. 1988).
        """
        distances = self._distances(points)
        nearer, farther = 1 - _share_below(self._unseen, distances), _share_below(distances, self._unseen)
        variance = nearer.var() / len(nearer) + farther.var() / len(farther)
        return {
            "share": float(nearer.mean()),
            "deviation": float(np.sqrt(variance)),
            "set": float(np.median(distances)),
            "unseen": float(np.median(self._unseen)),
        }

    def _distances(self, points: Float32Array) -> Float64Array:
        return np.asarray(self._seen.kneighbors(points)[0][:, 0], np.float64)


def _share_below(values: Float64Array, bounds: Float64Array) -> Float64Array:
    """Return for each bound the share of the values below it; those equal to it count as half."""
    ordered = np.sort(values)
    counts = np.searchsorted(ordered, bounds, "left") + np.searchsorted(ordered, bounds, "right")
    return np.asarray(counts / (2 * len(values)), np.float64)


class Closest:
    """The pictures of a set that are nearest to a training picture in pixels, each with that picture.

    Args:
        seen: Training pictures, and their mirror images where these were trained on.
        pixels: Their thumbnails, [n, values].
    """

    def __init__(self, seen: Sequence[Reference], pixels: Float32Array) -> None:
        self._seen = seen
        self._space = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(pixels)

    def best(self, before: list[Pair], images: UInt8Array, pixels: Float32Array) -> list[Pair]:
        """Return the nearest of the pairs before and of images [n, h, w, c], by their thumbnails; the nearest first."""
        distances, indices = (each[:, 0] for each in self._space.kneighbors(pixels))
        first = np.argsort(distances)[:PAIRS]
        ours = [(float(distances[at]), images[at].copy(), int(indices[at])) for at in first]
        return sorted([*before, *ours], key=lambda pair: pair[0])[:PAIRS]

    def draw(self, path: Path, pairs: list[Pair]) -> None:
        """Write pairs, the picture of training on the right."""
        _, ours, indices = zip(*pairs, strict=True)
        theirs = [self._seen[index // len(self._seen[0])][index % len(self._seen[0])] for index in indices]
        beside(path, np.stack(ours), np.stack(theirs))


def all_thumbnails(parts: Sequence[Reference], batch: int) -> Float32Array:
    """Return the thumbnails of all pictures of the parts, made a batch at a time."""
    return np.concatenate([thumbnails(images) for part in parts for images in part.batches(batch)])


def thumbnails(images: UInt8Array) -> Float32Array:
    """Return pictures [n, side, side, c] as averages over THUMBNAIL x THUMBNAIL areas, [n, values] in [0, 1]."""
    side = images.shape[1]
    size = min(side, THUMBNAIL)
    edges, pixel = np.arange(size + 1) * side / size, np.arange(side)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = (np.maximum(overlap, 0) * size / side).astype(np.float32)
    rows = np.einsum("ai,nijc->najc", weights, images / np.float32(255), optimize=True)
    averages: Float32Array = np.einsum("bj,najc->nabc", weights, rows, optimize=True)
    return averages.reshape(len(images), -1)
