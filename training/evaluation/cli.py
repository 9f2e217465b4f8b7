"""The command `evaluate-vae`: what a run or a bundle makes, against real pictures. Everything is imported late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from click_default_group import DefaultGroup

from training.commands import needs, refuse
from training.errors import TrainingError

FILE = click.Path(path_type=Path, dir_okay=False)


@contextmanager
def _clear_errors() -> Iterator[None]:
    from serve.errors import ServeError

    try:
        yield
    except (TrainingError, ServeError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"cannot write {error.filename or 'the results'}: {error.strerror or error}"
        ) from None


@click.group(cls=DefaultGroup, default="measure", context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
def main() -> None:
    """Measure what a run or a bundle makes (measure, which need not be named), or compare what was measured.

    \b
    evaluate-vae runs/mine --data photos/ --features extractor.onnx
    evaluate-vae compare runs/one runs/two --markdown table.md
    evaluate-vae measure --help          every option of measuring
    """


@main.command()
@click.argument("model", metavar="RUN_OR_BUNDLE", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    type=click.Path(path_type=Path),
    help="Real pictures, as train-vae takes them.",
)
@click.option(
    "--features", metavar="FILE", type=FILE, help="Extractor: an ONNX model, uint8 [n, h, w, 3] -> float [n, f]."
)
@click.option(
    "--inception",
    metavar="FILE",
    type=FILE,
    help="Extractor: TensorFlow's classify_image_graph_def.pb of 2015, for FID.",
)
@click.option("--count", metavar="N", type=click.IntRange(min=1), default=10_000, help="Pictures on each side.")
@click.option("--split", type=click.Choice(("train", "validation", "test")), default="train", help="Of the data.")
@click.option(
    "--prior",
    "priors",
    multiple=True,
    type=click.Choice(("normal", "second-stage", "gaussian", "gmm")),
    help="What to sample (repeatable).  [default: all that the run has]",
)
@click.option(
    "--normalise",
    "modes",
    multiple=True,
    type=click.Choice(("none", "scalar", "per-dimension")),
    help="Latent normalisation of fitted priors (repeatable).  [default: all for the second stage, else none]",
)
@click.option("--kid/--no-kid", default=True, help="Measure the kernel inception distance.")
@click.option("--precision-recall/--no-precision-recall", default=True, help="Measure improved precision and recall.")
@click.option("--latent-noise", is_flag=True, help="Add the second stage's own noise to its samples, as Dai & Wipf do.")
@click.option("--snapshots", is_flag=True, help="Measure REC and GEN-1 of the run's snapshots too; draw figure 2.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Of the samples.")
@click.option("--batch", metavar="N", type=click.IntRange(min=1), default=50, help="Pictures at a time.")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write the records there as well.")
@click.option("--markdown", metavar="FILE", type=FILE, help="Write the table there, with a row for each latent.")
@click.option(
    "--cache",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where ready pictures and references are kept.",
)
@needs("cpu,train")
def measure(
    model: Path,
    data: Path,
    features: Path | None,
    inception: Path | None,
    json_file: Path | None,
    markdown: Path | None,
    **options: Any,
) -> None:
    """Measure RUN_OR_BUNDLE, a run directory or an .onnx bundle, against real pictures.

    \b
    evaluate-vae runs/mine --data photos/ --features extractor.onnx
    evaluate-vae mine.onnx --data photos/ --features extractor.onnx --count 5000
    evaluate-vae compare runs/one runs/two --markdown table.md

    Of a run: reconstructions (REC), samples of stage 1 alone (GEN-1) and of every fitted prior (GEN-2, Gaussian,
    GMM), each as a Frechet distance, KID, precision and recall, and what the latents look like. Kept in its
    metrics.json. Of a bundle: its samples.
    """
    extractor = features or inception
    if extractor is None or (features and inception):
        raise click.UsageError("pass an extractor: either --features FILE or --inception FILE")
    if model.is_file():
        refuse(("priors", "modes", "latent_noise"), "is settled in a bundle; measure the run to choose another")
        refuse(("snapshots",), "measures those of a run, and a bundle has none")
    from training.evaluation.evaluator import Plan
    from training.evaluation.measure import evaluate
    from training.evaluation.report import report, write

    plan = Plan(extractor, inception=inception is not None, **options)
    with _clear_errors():
        done = evaluate(model, data, plan, partial(click.echo, err=True))
        click.echo(report(done.name, done.records), nl=False)
        if markdown:
            write(markdown, report(done.name, done.records, every_latent=True))
        if json_file:
            write(json_file, json.dumps(done.document(), indent=2) + "\n")


@main.command()
@click.argument(
    "paths", metavar="RUN_OR_JSON ...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option("--markdown", metavar="FILE", type=FILE, help="Write the tables there as well.")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write all records there.")
@needs("cpu,train")
def compare(paths: tuple[Path, ...], markdown: Path | None, json_file: Path | None) -> None:
    """Put measured runs, or files that --json wrote, into one table; the best of every column is bold."""
    from training.evaluation import compare as comparison
    from training.evaluation.report import write

    with _clear_errors():
        measured = [comparison.read(path) for path in paths]
        text = comparison.compare(measured)
        click.echo(text, nl=False)
        if markdown:
            write(markdown, text)
        if json_file:
            write(json_file, json.dumps([each.document() for each in measured], indent=2) + "\n")
