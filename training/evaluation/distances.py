"""Distances of two sets of features. A value only compares with others of the same extractor."""

from __future__ import annotations

import numpy as np
from scipy import linalg
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from training.evaluation.statistics import NEIGHBOURS, Statistics
from training.types import Float32Array, Float64Array

SUBSETS, SUBSET = 50, 1000  # of KID: how many, and the features in one at most
WORKING_MEMORY = 256  # MiB of distances held at a time


def frechet(a: Statistics, b: Statistics) -> float:
    """Return the Frechet distance of two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^1/2) (Heusel et al. 2017).

    Ca Cb has the eigenvalues of Ca^1/2 Cb Ca^1/2, which is symmetric, so they are real. The root Ca^1/2 is cached:
    pass as `a` the statistics that many others are compared with.
    """
    squares = linalg.eigvalsh(a.root @ b.covariance @ a.root)
    cross = np.sqrt(np.maximum(squares, 0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def subset_size(real: int, fake: int) -> int:
    """Return the number of features in a subset of KID: SUBSET, or half the smaller set if that is less."""
    return max(2, min(SUBSET, real // 2, fake // 2))


def kid(real: Float32Array, fake: Float32Array, seed: int) -> tuple[float, float]:
    """Return the kernel inception distance and its standard deviation over subsets (Binkowski et al. 2018).

    The unbiased squared maximum mean discrepancy under the kernel (x.y / f + 1)^3, on SUBSETS pairs of
    random subsets.
    """
    size = subset_size(len(real), len(fake))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(SUBSETS):
        x = real[rng.choice(len(real), size, replace=False)].astype(np.float64)
        y = fake[rng.choice(len(fake), size, replace=False)].astype(np.float64)
        within = [polynomial_kernel(each) for each in (x, y)]  # degree 3, gamma 1 / f, constant 1
        inner = sum((kernel.sum() - np.trace(kernel)) / (size * (size - 1)) for kernel in within)
        values.append(inner - 2 * polynomial_kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real: Float32Array, fake: Float32Array) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019), k = NEIGHBOURS, both in [0, 1].

    Precision is the share of fakes that are, for some real one, at most as far away as that real one's k-th neighbour
    among the real. Recall is the same with the roles exchanged.
    """
    return _covered(fake, real), _covered(real, fake)


def _covered(points: Float32Array, by: Float32Array) -> float:
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(by)
    reach = nearest.kneighbors()[0][:, -1]  # without an argument, a point is not counted as its own neighbour

    def within(distances: Float64Array, start: int) -> list[bool]:
        return list((distances <= reach).any(axis=1))

    chunks = pairwise_distances_chunked(points, by, reduce_func=within, working_memory=WORKING_MEMORY)
    return float(np.mean([inside for chunk in chunks for inside in chunk]))
