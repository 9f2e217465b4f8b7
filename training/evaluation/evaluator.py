"""What to measure, and the evaluator that compares sets of pictures with the reference: a flat record each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from training.errors import DataError
from training.evaluation import distances
from training.evaluation.extractors import Extractor
from training.evaluation.reference import Reference, statistics
from training.evaluation.statistics import NEIGHBOURS, collect, too_few
from training.types import Record, UInt8Array


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        extractor: Its file.
        inception: Whether that is the Inception graph of 2015, and not an ONNX model.
        count: Pictures measured against, and samples of each prior.
        split: Of the data.
        cache: Folder for ready pictures and references; the user's where it is None.
        priors: Their names; all of the run's where there are none.
        modes: Latent normalisations; where there are none, all for the second stage.
        kid: Whether to measure the kernel inception distance.
        precision_recall: Whether to measure precision and recall.
        latent_noise: Whether second-stage samples get the noise of their likelihood.
        seed: Of samples and of KID's subsets.
        snapshots: Whether to measure a run's snapshots.
        batch: Pictures at a time.
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
    latent_noise: bool
    seed: int
    snapshots: bool
    batch: int


class Evaluator:
    """Compares sets of pictures with the reference.

    Attributes:
        no_distance: Why there are too few pictures for a Frechet distance; empty where there are enough.

    Raises:
        DataError: too few pictures for anything that the plan measures, or the cache cannot be written.
    """

    def __init__(self, plan: Plan, reference: Reference, extractor: Extractor) -> None:
        fewest = min(len(reference), plan.count)
        least = NEIGHBOURS + 1 if plan.precision_recall else 2
        if fewest < least:
            what = "precision and recall take" if plan.precision_recall else "a variance takes"
            raise DataError(
                f"{what} {least} pictures or more. Received: {fewest}; raise --count, or bring more pictures"
            )
        self.no_distance = too_few(fewest, extractor)
        if self.no_distance and not (plan.kid or plan.precision_recall):
            raise DataError(f"{self.no_distance}; or measure KID, which takes fewer")
        self.plan, self.reference, self.extractor = plan, reference, extractor
        self.console = Console(stderr=True)
        through = partial(self._shown, label="reference", count=len(reference))
        self.known = statistics(reference, extractor, plan.cache, plan.batch, through)

    def __call__(self, batches: Iterable[UInt8Array], count: int, name: str, **protocol: str | float) -> Record:
        """Return the record of a set of pictures."""
        plan = self.plan
        label = " ".join([name, *(str(value) for value in protocol.values())])
        found = collect(self.extractor, self._shown(batches, label, count), keep=plan.kid or plan.precision_recall)
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
        return record | {
            "count": found.count,
            "seed": plan.seed,
            "reference": self.reference.card,
            "extractor": self.extractor.card(),
        }

    def _shown(self, batches: Iterable[UInt8Array], label: str, count: int) -> Iterable[UInt8Array]:
        """Pass batches on, with a bar on stderr where that is a terminal."""
        total = math.ceil(count / self.plan.batch)
        return track(batches, label, total, console=self.console, disable=not self.console.is_terminal)
