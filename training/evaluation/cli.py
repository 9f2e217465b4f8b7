"""The command `evaluate-vae`: what a run or a bundle makes, against real pictures. Everything is imported late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from training.commands import Group, needs, refuse
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


@click.group(
    cls=Group,
    default="measure",
    subcommand_metavar="RUN_OR_BUNDLE | COMMAND ...",
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.version_option(package_name="balanced-vae")
def main() -> None:
    """Measure the pictures of a run or a bundle against real ones, or compare runs that were measured.

    The command measure is the default: its name may be left out.

    \b
    evaluate-vae runs/mine --data photos/ --features extractor.onnx
    evaluate-vae compare runs/one runs/two --markdown table.md
    """


@main.command()
@click.argument("model", metavar="RUN_OR_BUNDLE", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    type=click.Path(path_type=Path),
    help="Real pictures to measure against, in any form that train-vae takes.",
)
@click.option(
    "--features",
    metavar="FILE",
    type=FILE,
    help="Feature extractor: an ONNX model from uint8 [n, h, w, 3] to float [n, features].",
)
@click.option(
    "--inception",
    metavar="FILE",
    type=FILE,
    help="Feature extractor: TensorFlow's classify_image_graph_def.pb of 2015, with which the distance is a FID.",
)
@click.option(
    "--count",
    metavar="N",
    type=click.IntRange(min=1),
    default=10_000,
    help="How many generated pictures, and how many real ones.",
)
@click.option(
    "--split",
    type=click.Choice(("train", "validation", "test")),
    default="train",
    help="The split of --data to measure against.",
)
@click.option(
    "--prior",
    "priors",
    multiple=True,
    type=click.Choice(("normal", "second-stage", "gaussian", "gmm")),
    help="The prior to sample latents from (repeatable).  [default: all that the run has]",
)
@click.option(
    "--normalise",
    "modes",
    multiple=True,
    type=click.Choice(("none", "scalar", "per-dimension")),
    help="The latent normalisation of a fitted prior's samples (repeatable).  [default: all for the second stage, "
    "else none]",
)
@click.option("--kid/--no-kid", default=True, help="Measure the kernel inception distance (KID).")
@click.option("--precision-recall/--no-precision-recall", default=True, help="Measure improved precision and recall.")
@click.option(
    "--copying/--no-copying",
    default=None,
    help="Measure whether samples are nearer to training pictures than pictures that were held back are.  [default: "
    "where some were]",
)
@click.option(
    "--copies",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also draw the samples that are nearest to a training picture, each beside it, a sheet a set.",
)
@click.option("--latent-noise", is_flag=True, help="Add the second stage's own noise to its samples, as Dai & Wipf do.")
@click.option("--plain", is_flag=True, help="Measure stage 1's own decoder where the run has a sharpened one.")
@click.option(
    "--snapshots",
    is_flag=True,
    help="Also measure the run's snapshots (REC and GEN-1 as training went), and draw figure 2.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**64 - 1), default=0, help="Seed of the generated pictures."
)
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(min=1),
    default=50,
    help="How many pictures the networks take at a time.",
)
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Also write the records to this file, as JSON.")
@click.option(
    "--markdown", metavar="FILE", type=FILE, help="Also write the table to this file, with a row for each latent."
)
@click.option(
    "--cache",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where decoded pictures and the features of real ones are kept.  [default: ~/.cache/balanced-vae]",
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

    Of a run these are measured: its reconstructions (REC), samples of stage 1 alone (GEN-1) and samples of every
    fitted prior (GEN-2, Gaussian, GMM), each by Frechet distance, KID, precision, recall and, where pictures were held
    back, copying; and the statistics of its latents. The records are kept in the run's metrics.json. Of a bundle its
    samples are measured.
    """
    extractor = features or inception
    if extractor is None or (features and inception):
        raise click.UsageError("pass an extractor: either --features FILE or --inception FILE")
    if model.is_file():
        choices = ("priors", "modes", "latent_noise", "plain")
        refuse(choices, "is settled in a bundle; measure the run to choose another")
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
@click.option("--markdown", metavar="FILE", type=FILE, help="Also write the table to this file.")
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Also write all records to this file, as JSON.")
def compare(paths: tuple[Path, ...], markdown: Path | None, json_file: Path | None) -> None:
    """Put measured runs into one table, with the best figure of each column in bold.

    Each RUN_OR_JSON is a run directory that evaluate-vae has measured, or a file that its --json wrote.
    """
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
