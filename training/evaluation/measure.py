"""Measure a run or a bundle from end to end. A run keeps the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.data.dataset import load_data
from training.errors import DataError, RunError
from training.evaluation.compare import Measured
from training.evaluation.evaluator import Evaluator, Plan
from training.evaluation.extractors import OnnxExtractor
from training.evaluation.inception import Inception
from training.evaluation.reference import applied, choose, held_back, not_trained_on
from training.evaluation.snapshots import figure2
from training.evaluation.subjects import BundleSubject, RunSubject
from training.files import write_json
from training.record.progress import reading
from training.record.run import MEASURING, Run
from training.types import Record

# Two records are the same measurement if these are equal; all else in them is the result.
PROTOCOL = (
    "metric",
    "set",
    "prior",
    "normalisation",
    "latent_noise",
    "decoder",
    "epoch",
    "count",
    "seed",
    "reference",
    "extractor",
)


def evaluate(model: Path, data: Path, plan: Plan, say: Callable[[str], None]) -> Measured:
    """Measure a run directory or a bundle against the pictures of `data`.

    Each record is added to the run's metrics.json as soon as it is there; with snapshots, figure 2 is drawn. `say` is
    called with lines for a person to read.

    Raises:
        DataError: the pictures or the extractor cannot be used, or the cache cannot be written.
        RunError: the run is not finished, lacks what the plan asks for, or holds measurements that cannot be read.
        ServeError: the file is not a bundle, or cannot be run here.
        OSError: the run's folder cannot be written.
    """
    run = Run(model) if model.is_dir() else None
    versions = run.versions if run else {}
    subject = RunSubject(run, plan) if run else BundleSubject(model, plan)
    if not run:
        say("a bundle holds no encoder: its samples are measured, no reconstructions and no latents")
    extractor = (Inception if plan.inception else OnnxExtractor)(plan.extractor, subject.pictures.side)
    with reading() as advance:
        splits = load_data(data, subject.pictures, skip_unreadable=True, cache=plan.cache, advance=advance)
    say(f"{splits.train.report.kind}: {splits.train.report}")
    reference = choose(splits, plan.split, plan.count, subject.pictures)
    if settings := applied(subject.pictures):
        say(f"the run's settings leave out pictures here too: {settings}")
    if plan.copies and (why_not := not_trained_on(splits, plan.split, subject.trained_on)):
        raise DataError(f"--copies cannot draw what is nearest to training pictures: {why_not}; leave it out")
    unseen = None
    if plan.copying is not False:
        unseen, why_not = held_back(splits, plan.split, subject.pictures, subject.trained_on)
        if why_not and plan.copying:
            raise DataError(f"copying cannot be measured: {why_not}; or leave out --copying")
        if why_not:
            say(f"copying is not measured: {why_not}")
    if (unseen or plan.copies) and len(reference) < reference.card["of"]:
        total = reference.card["of"]
        say(f"copies are sought of {len(reference):,} of {total:,} training pictures; --count {total} sees all")
    evaluator = Evaluator(plan, reference, extractor, say, unseen, subject.pictures.flip)
    if evaluator.no_distance and plan.snapshots:
        raise DataError(f"--snapshots draws Frechet distances, and there is none: {evaluator.no_distance}")
    if evaluator.no_distance:
        say(f"no {extractor.metric} is measured: {evaluator.no_distance}")
    records = []
    for record in subject.records(evaluator):
        records.append(record)
        if run:
            keep(run, record, versions)
    if plan.copies:
        say(f"drew what is nearest to training pictures into {plan.copies}")
    if run and plan.snapshots:
        with run.locked(MEASURING):
            say(f"drew {figure2(run, records)}")
    return Measured(subject.name, subject.recipe, records)


def keep(run: Run, record: Record, versions: Mapping[str, int]) -> None:
    """Add a record to the run's metrics.json, in the place of an earlier one of the same measurement.

    A lock is held, as another process that measures the run could add a record between our reading and writing.

    Args:
        run: The run.
        record: What was measured.
        versions: Those of the networks that it was measured of, as `Run.versions`.

    Raises:
        RunError: metrics.json cannot be read, or the run has other networks by now.
    """
    with run.locked(MEASURING):
        if versions.items() - run.versions.items():
            raise RunError(f"{run.path} was trained on while it was measured; measure it once it is finished")
        others = [each for each in run.metrics if _protocol(each) != _protocol(record)]
        write_json(run.path / "metrics.json", [*others, record])


def _protocol(record: Record) -> list[Any]:
    return [record.get(key) for key in PROTOCOL]
