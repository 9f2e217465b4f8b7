"""What to measure, and the evaluator, which compares a set of pictures with the reference and returns a record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from training.errors import DataError
from training.evaluation import distances
from training.evaluation.copying import Closest, Copying, Pair, all_thumbnails, thumbnails
from training.evaluation.extractors import Extractor
from training.evaluation.reference import Reference, statistics
from training.evaluation.statistics import NEIGHBOURS, Statistics, collect, too_few
from training.types import Float32Array, Record, UInt8Array

EVERY = 15.0  # seconds between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        extractor: The file of the extractor.
        inception: Whether that file is the Inception graph of 2015, and not an ONNX model.
        count: Real pictures, and samples of each prior.
        split: The split that the real pictures are from.
        cache: The folder for decoded pictures and references; None means the user's cache folder.
        priors: Names of the priors to sample; none means all that the run has.
        modes: Latent normalisations; none means all of them for the second stage.
        kid: Whether to measure the kernel inception distance.
        precision_recall: Whether to measure precision and recall.
        copying: Whether to compare with training pictures and such that were held back; None where there are any.
        latent_noise: Whether second-stage samples get the noise of their likelihood.
        seed: The seed of the samples and of KID's subsets.
        plain: Whether to measure stage 1's own decoder where the run has a sharpened one.
        snapshots: Whether to measure a run's snapshots.
        batch: Pictures in a batch.
        copies: The folder to draw each set's pictures in that are nearest to training pictures, beside these.
    """

    extractor: Path
    inception: bool
    count: int
    split: str
    cache: Path | None
    priors: tuple[str, ...]
    modes: tuple[str, ...]
    kid: bool
    precision_recall: bool
    copying: bool | None
    latent_noise: bool
    plain: bool
    seed: int
    snapshots: bool
    batch: int
    copies: Path | None


class Evaluator:
    """Compares sets of pictures with the reference.

    Args:
        plan: What to measure.
        reference: The real pictures.
        extractor: Computes the features of both.
        say: Takes lines of progress where there is no terminal for a bar.
        unseen: Pictures that training never saw, where copying is measured: then the reference are such that it saw.
        flip: Whether it saw their mirror images too.

    Attributes:
        no_distance: Why there is no Frechet distance, as there are too few pictures; empty if there are enough.

    Raises:
        DataError: there are too few pictures for the plan, or the cache cannot be written.
    """

    def __init__(
        self,
        plan: Plan,
        reference: Reference,
        extractor: Extractor,
        say: Callable[[str], None] = lambda line: None,
        unseen: Reference | None = None,
        flip: bool = False,
    ) -> None:
        fewest = min(len(reference), plan.count)
        least = NEIGHBOURS + 1 if plan.precision_recall else 2
        if fewest < least:
            what = "precision and recall take" if plan.precision_recall else "a variance takes"
            raise DataError(f"{what} {least} pictures or more. Received: {fewest}; {reference.more}")
        self.no_distance = too_few(fewest, extractor, reference.more)
        if self.no_distance and not (plan.kid or plan.precision_recall or unseen):
            raise DataError(f"{self.no_distance}; or measure KID, which takes fewer")
        self.plan, self.reference, self.extractor, self.say = plan, reference, extractor, say
        self.console = Console(stderr=True)
        self.known = self._known(reference, "reference")
        seen = [reference, reference.mirror()] if flip else [reference]
        self.copying: Copying | None = None
        self.closest: Closest | None = None
        if unseen or plan.copies:
            pixels = all_thumbnails(seen, plan.batch)
        if unseen:
            others = self._known(unseen, unseen.card["split"]).features
            features = [self.known.features, *(self._known(each, "mirror images").features for each in seen[1:])]
            theirs = all_thumbnails([unseen], plan.batch)
            self.copying = Copying(np.concatenate(features), pixels, others, theirs, unseen.card)
        if plan.copies:
            self.closest = Closest(seen, pixels)

    def __call__(self, batches: Iterable[UInt8Array], count: int, name: str, **protocol: str | float) -> Record:
        """Return the record of a set of pictures."""
        plan = self.plan
        label = " ".join([name, *(str(value) for value in protocol.values())])
        pixels, pairs = list[Float32Array](), list[Pair]()
        keep = plan.kid or plan.precision_recall or self.copying is not None
        found = collect(self.extractor, self._noted(self._shown(batches, label, count), pixels, pairs), keep)
        if self.closest and plan.copies:
            self.closest.draw(plan.copies / f"{label.replace(' ', '-')}.png", pairs)
        record: Record = {"metric": self.extractor.metric, "set": name, **protocol}
        record["value"] = None if self.no_distance else distances.frechet(self.known, found)
        if plan.kid:
            size = distances.subset_size(self.known.count, found.count)
            mean, deviation = distances.kid(self.known.features, found.features, plan.seed)
            subsets = {"kid_subsets": distances.SUBSETS, "kid_subset": size}
            record |= {"kid": mean, "kid_deviation": deviation, **subsets}
        if plan.precision_recall:
            precision, recall = distances.precision_recall(self.known.features, found.features)
            record |= {"precision": precision, "recall": recall, "neighbours": NEIGHBOURS}
        if self.copying and "epoch" not in protocol:
            record |= self.copying(found.features, np.concatenate(pixels))
        return record | {
            "count": found.count,
            "seed": plan.seed,
            "reference": self.reference.card,
            "extractor": self.extractor.card(),
        }

    def _known(self, reference: Reference, label: str) -> Statistics:
        through = partial(self._shown, label=label, count=len(reference))
        return statistics(reference, self.extractor, self.plan.cache, self.plan.batch, through)

    def _noted(
        self, batches: Iterable[UInt8Array], pixels: list[Float32Array], pairs: list[Pair]
    ) -> Iterator[UInt8Array]:
        """Yield the batches; note their thumbnails, and the closest pairs so far."""
        for images in batches:
            if self.copying or self.closest:
                pixels.append(thumbnails(images))
            if self.closest:
                pairs[:] = self.closest.best(pairs, images, pixels[-1])
            yield images

    def _shown(self, batches: Iterable[UInt8Array], label: str, count: int) -> Iterable[UInt8Array]:
        """Yield the batches, with a bar on stderr if that is a terminal, else with lines."""
        if not self.console.is_terminal:
            return self._told(batches, label, count)
        return track(batches, label, math.ceil(count / self.plan.batch), console=self.console)

    def _told(self, batches: Iterable[UInt8Array], label: str, count: int) -> Iterator[UInt8Array]:
        """Yield the batches; every so often, and at their end, say how far they are."""
        done, began = 0, time.monotonic()
        said = began
        for images in batches:
            yield images
            done, now = done + len(images), time.monotonic()
            if done >= count or now - said >= EVERY:
                said, speed = now, done / max(now - began, 1e-9)
                left = (count - done) / speed / 60
                self.say(f"{label}: {done:,}/{count:,}  {speed:,.0f} images/s  ETA {left:,.1f} min")
