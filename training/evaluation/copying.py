"""Copying: whether a set of pictures is nearer to the training pictures than pictures are that training never saw.

The test of Meehan, Chaudhuri and Dasgupta (A Non-Parametric Test to Detect Data-Copying in Generative Models, 2020),
over all of the space at once: of a picture of the set and one that was held back, either drawn at random, how likely is
the former to be nearer to its nearest training picture? .5 for pictures as new as those held back, 1 for copies, and
less than .5 for pictures that are like no real ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors

from training.evaluation.reference import Reference
from training.record.grids import beside
from training.types import Float32Array, Float64Array, Record, UInt8Array

Pair = tuple[float, UInt8Array, int]  # a distance, a picture, and the index of one in the reference

PAIRS = 32  # that are drawn
THUMBNAIL = 16  # height and width of the pictures of which the pixels are compared


class Copying:
    """Compares sets of pictures with the training pictures, in features and in pixels.

    Args:
        seen: Training pictures.
        seen_features: Their features, [n, f].
        unseen: Pictures that training never saw.
        unseen_features: Theirs.
        batch: Pictures in a batch.
    """

    def __init__(
        self,
        seen: Reference,
        seen_features: Float32Array,
        unseen: Reference,
        unseen_features: Float32Array,
        batch: int,
    ) -> None:
        self._spaces = {
            "features": _Space(seen_features, unseen_features),
            "pixels": _Space(*(_all_thumbnails(each, batch) for each in (seen, unseen))),
        }
        self._unseen = len(unseen)

    def __call__(self, features: Float32Array, pixels: Float32Array) -> Record:
        """Return what a record says of a set of pictures, by its features [n, f] and its thumbnails."""
        found = {
            name: space(points) for (name, space), points in zip(self._spaces.items(), (features, pixels), strict=True)
        }
        return {
            "copying": found["features"]["share"],
            "copying_pixels": found["pixels"]["share"],
            "copying_distances": {name: {key: each[key] for key in ("set", "unseen")} for name, each in found.items()},
            "unseen": self._unseen,
        }


class _Space:
    """The training pictures as points, and how far the unseen ones are from them."""

    def __init__(self, seen: Float32Array, unseen: Float32Array) -> None:
        self._seen = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(seen)
        self._unseen = np.sort(self._distances(unseen))

    def __call__(self, points: Float32Array) -> dict[str, float]:
        """Return the share of pairs in which a point is nearer than an unseen one, and both median distances."""
        distances = self._distances(points)
        nearer, as_near = (
            len(self._unseen) - np.searchsorted(self._unseen, distances, side) for side in ("right", "left")
        )
        share = (nearer + as_near).mean() / (2 * len(self._unseen))  # a pair that is as near counts as half
        return {"share": float(share), "set": float(np.median(distances)), "unseen": float(np.median(self._unseen))}

    def _distances(self, points: Float32Array) -> Float64Array:
        return np.asarray(self._seen.kneighbors(points)[0][:, 0], np.float64)


class Closest:
    """The pictures of a set that are nearest to a training picture in pixels, each with that picture.

    Args:
        seen: Training pictures.
        batch: Pictures in a batch.
    """

    def __init__(self, seen: Reference, batch: int) -> None:
        self._seen = seen
        self._space = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(_all_thumbnails(seen, batch))

    def best(self, before: list[Pair], images: UInt8Array, pixels: Float32Array) -> list[Pair]:
        """Return the nearest of the pairs before and of images [n, h, w, c], by their thumbnails; the nearest first."""
        distances, indices = (each[:, 0] for each in self._space.kneighbors(pixels))
        first = np.argsort(distances)[:PAIRS]
        ours = [(float(distances[at]), images[at].copy(), int(indices[at])) for at in first]
        return sorted([*before, *ours], key=lambda pair: pair[0])[:PAIRS]

    def draw(self, path: Path, pairs: list[Pair]) -> None:
        """Write pairs, the picture of training on the right."""
        _, ours, indices = zip(*pairs, strict=True)
        beside(path, np.stack(ours), self._seen.images[self._seen.chosen[list(indices)]])


def _all_thumbnails(pictures: Reference, batch: int) -> Float32Array:
    return np.concatenate([*map(thumbnails, pictures.batches(batch))])


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
