"""Copying: whether a set of pictures is nearer to the training pictures than pictures are that training never saw.

The test of Meehan, Chaudhuri and Dasgupta (A Non-Parametric Test to Detect Data-Copying in Generative Models, 2020),
over all of the space at once: of a picture of the set and one that was held back, either drawn at random, how likely is
the former to be nearer to its nearest training picture? .5 for pictures as new as those held back, 1 for copies, and
less than .5 for pictures that are like no real ones.
"""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

from training.evaluation.reference import Reference
from training.types import Float32Array, Float64Array, Record, UInt8Array

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
        pixels, others = (np.concatenate([*map(thumbnails, each.batches(batch))]) for each in (seen, unseen))
        self._spaces = {
            "features": _Space(seen_features, unseen_features),
            "pixels": _Space(pixels, others),
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
