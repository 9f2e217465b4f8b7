"""How far two decoders' images of the same noise are apart: in grey levels, and in an extractor's features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ExportError
from serve import bundle
from serve.card import Card
from serve.engine import Engine
from serve.model import Decode
from serve.noise import Noise, draw
from training.data.dataset import load_data
from training.evaluation.extractors import OnnxExtractor
from training.evaluation.reference import choose, pictures_of, statistics
from training.evaluation.statistics import Moments, Statistics, check_enough

BATCH = 64
SEED = 1  # of the noise compared on


@dataclass(frozen=True)
class Difference:
    """Grey levels between two decoders' images, over all values compared.

    Attributes:
        samples: Images compared.
        mean: The mean difference.
        worst: The largest difference.
        share: The share of values that differ at all, in [0, 1].
        distance: The Frechet distance of the first one's images from real pictures, where measured (`Distance`).
        shift: How far the second one's distance is from that, relative to it.
    """

    samples: int
    mean: float
    worst: int
    share: float
    distance: float | None = None
    shift: float | None = None

    def text(self, first: str, second: str) -> str:
        """Return the difference as a sentence or two about decoders of these names."""
        if self.worst == 0:
            return f"{first} and {second} make the same {self.samples:,} samples, byte for byte"
        same = "make the same samples, but for rounding" if self.worst == 1 else "make different samples"
        text = (
            f"{first} and {second} {same}: {self.mean:.3g} grey levels apart on average, {self.worst} at most, "
            f"{self.share:.2%} of values differ (over {self.samples:,} samples)"
        )
        if self.distance is not None and self.shift is not None:
            text += f"; Frechet distance {self.distance:.2f}, changed by {self.shift:+.2%}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return what a card keeps: figures to four digits."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in known.items()}


class Distance:
    """The Frechet distance of generated pictures from real ones, in an extractor's features.

    Args:
        features: The extractor, an ONNX file, as evaluate-vae takes it.
        pictures: Real pictures, as train-vae takes them.
        card: Says how they are read.
        count: Pictures of each.

    Attributes:
        extractor: Of features.

    Raises:
        DataError: of the extractor or the pictures.
    """

    def __init__(self, features: Path, pictures: Path, card: Card, count: int) -> None:
        recipe = pictures_of(card)
        self.extractor = OnnxExtractor(features, recipe.side)
        reference = choose(load_data(pictures, recipe, skip_unreadable=True), "train", count, recipe)
        check_enough(min(count, len(reference)), self.extractor)
        self.known = statistics(reference, self.extractor, None, BATCH, iter)

    def of(self, found: Moments) -> float:
        """Return how far pictures with these moments of features are from the real ones."""
        # scikit-learn takes a second to import, and most comparisons measure no distance.
        from training.evaluation.distances import frechet

        none = np.empty((0, self.extractor.size), np.float32)
        return frechet(self.known, Statistics(found.count, found.mean, found.covariance, none))


def compare(first: Decode, second: Decode, noise_size: int, count: int, distance: Distance | None = None) -> Difference:
    """Return how far two decoders are apart on `count` samples of contract noise; one batch is in memory at a time."""
    total, differing, worst, values = 0, 0, 0, 0
    moments = [Moments(distance.extractor.size) for _ in range(2)] if distance else []
    for noise in _batches(noise_size, count):
        pair = first(noise), second(noise)
        apart = np.abs(pair[0].astype(np.int16) - pair[1])
        total, worst = total + int(apart.sum()), max(worst, int(apart.max()))
        differing, values = differing + int(np.count_nonzero(apart)), values + apart.size
        if distance:
            for known, images in zip(moments, pair, strict=True):
                known.add(distance.extractor(images))
    found = Difference(count, total / values, worst, differing / values)
    if distance is None:
        return found
    own, other = (distance.of(known) for known in moments)
    return Difference(found.samples, found.mean, found.worst, found.share, own, other / own - 1)


def compare_bundles(first: Path, second: Path, count: int) -> Difference:
    """Return how far two bundles are apart, each on the engine that would serve it here.

    Raises:
        BundleError: a file is no bundle.
        ExportError: they take different noise, or make pictures of different shapes.
    """
    engines = [Engine(bundle.load(path)) for path in (first, second)]
    kinds = [(engine.card.noise_size, engine.card.image_shape) for engine in engines]
    if kinds[0] != kinds[1]:
        said = [f"{noise} numbers to {'x'.join(map(str, shape))}" for noise, shape in kinds]
        raise ExportError(
            f"bundles to compare should map noise to pictures of one shape. Received: {' and '.join(said)}"
        )
    return compare(engines[0].decode, engines[1].decode, kinds[0][0], count)


def _batches(noise_size: int, count: int) -> Iterator[Noise]:
    for at in range(0, count, BATCH):
        yield draw(SEED, at, min(BATCH, count - at), noise_size)
