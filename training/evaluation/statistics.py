"""The mean and covariance of features that come in batches, and on request the features themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import linalg

from training.errors import DataError
from training.evaluation.extractors import Extractor
from training.types import Float32Array, Float64Array, UInt8Array

NEIGHBOURS = 3  # k of precision and recall, which take more pictures than that


@dataclass(frozen=True)
class Statistics:
    """The features of a set of pictures.

    Attributes:
        count: Number of pictures.
        mean: Mean of the features, float64 [f].
        covariance: Unbiased covariance of the features, float64 [f, f].
        features: float32 [count, f], or [0, f] if they were not kept.
    """

    count: int
    mean: Float64Array
    covariance: Float64Array
    features: Float32Array

    @cached_property
    def root(self) -> Float64Array:
        """The symmetric square root of the covariance, [f, f]."""
        values, vectors = linalg.eigh(self.covariance)
        root: Float64Array = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return root


class Moments:
    """Accumulates the mean and covariance of rows in batches, in float64.

    Each batch is centred at its own mean before it is merged (Chan, Golub & LeVeque), which avoids cancellation.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = np.zeros(size)
        self.scatter = np.zeros((size, size))

    def add(self, rows: Float32Array) -> None:
        """Add rows [n, size], with n above 0."""
        values = rows.astype(np.float64)
        mean = values.mean(axis=0)
        apart = mean - self.mean
        total = self.count + len(rows)
        centred = values - mean
        self.scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean += apart * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Float64Array:
        """The unbiased covariance, [size, size]."""
        return self.scatter / (self.count - 1)


def collect(extractor: Extractor, batches: Iterable[UInt8Array], keep: bool = True) -> Statistics:
    """Return the statistics of pictures in batches; with `keep`, their features too."""
    moments = Moments(extractor.size)
    kept = [np.empty((0, extractor.size), np.float32)]
    for images in batches:
        features = extractor(images)
        moments.add(features)
        if keep:
            kept.append(features)
    return Statistics(moments.count, moments.mean, moments.covariance, np.concatenate(kept))


def too_few(count: int, extractor: Extractor, more: str = "raise --count and bring more pictures") -> str:
    """Return why so few pictures have no Frechet distance, as their covariance is singular; empty if they have one.

    `more` says what to do for more pictures.
    """
    least = extractor.size + 1
    if count >= least:
        return ""
    return (
        f"{extractor.name} has {extractor.size} features, whose covariance takes {least} pictures or more. "
        f"Received: {count}; {more}, or take an extractor with fewer features"
    )


def check_enough(count: int, extractor: Extractor) -> None:
    """Raise DataError if there are too few pictures for a Frechet distance."""
    if why := too_few(count, extractor):
        raise DataError(why)
