"""The command `export-onnx`. TensorFlow and the rest are imported late."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from serve.card import NAME, NAME_RULE, name_from
from training.commands import Group, needs, refuse

FILE = click.Path(path_type=Path, dir_okay=False)


def _name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not NAME.fullmatch(value):
        raise click.BadParameter(NAME_RULE)
    return value


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Say what went wrong in one line; exit with 1."""
    from export.errors import ExportError
    from serve.errors import ServeError
    from training.errors import TrainingError

    try:
        yield
    except (ExportError, ServeError, TrainingError) as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def _clear_write(path: Path) -> Iterator[None]:
    """Say in one line that something cannot be written; exit with 1."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from None


@click.group(
    cls=Group,
    default="export",
    subcommand_metavar="RUN_OR_BUNDLE | COMMAND ...",
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.version_option(package_name="balanced-vae")
def main() -> None:
    """Export a run as one ONNX file (a bundle), show what a bundle is, or compare two of them.

    The command export is the default: its name may be left out.

    \b
    export-onnx runs/mine --out mine.onnx
    export-onnx runs/mine --out mine.onnx --precision fp32 --precision int8
    export-onnx inspect mine.onnx
    export-onnx diff mine-fp32.onnx mine-int8.onnx
    """


@main.command()
@click.argument("source", metavar="RUN_OR_BUNDLE", type=click.Path(path_type=Path))
# What is written
@click.option("--out", metavar="FILE", required=True, type=FILE, help="The .onnx file to write.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(("fp32", "fp16", "int8")),
    default=("fp32",),
    help="What the graph computes in: fp16 for GPUs, int8 for CPUs. Repeatable: the files are then called "
    "mine-fp32.onnx, mine-int8.onnx.",
)
@click.option(
    "--store",
    type=click.Choice(("float32", "float16")),
    default="float32",
    help="How float weights are stored; float16 halves the file. What the graph computes in is --precision's alone.",
)
@click.option(
    "--triton-repository",
    "triton",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write a model repository for NVIDIA Triton into this folder, and a KServe InferenceService beside it.",
)
# What is exported
@click.option(
    "--prior",
    type=click.Choice(("second-stage", "gmm", "gaussian", "normal")),
    help="What latents are sampled from: the second stage (GEN-2), a mixture of Gaussians (gmm) or a Gaussian fitted "
    "to the latents, or the standard normal (GEN-1).  [default: the first of these that the run has]",
)
@click.option(
    "--normalise",
    type=click.Choice(("none", "scalar", "per-dimension", "guarded")),
    default="scalar",
    help="How second-stage latents are given the aggregate posterior's variance. guarded: as scalar where they "
    "evidently lack it, by the paper's rule, else as none.",
)
@click.option("--plain", is_flag=True, help="Take stage 1's own decoder where the run has a sharpened one.")
@click.option(
    "--with-latents", is_flag=True, help="Add a second output to the graph: latents, float32 [batch, latent_dim]."
)
# What a precision may change
@click.option(
    "--limit-mean",
    metavar="LEVELS",
    type=click.FloatRange(0, 255),
    default=1.0,
    help="Largest mean difference from fp32's samples, in grey levels; beyond it nothing is written. int8 keeps layers "
    "in float to stay below it.",
)
@click.option(
    "--limit-fd",
    metavar="SHARE",
    type=click.FloatRange(0),
    default=0.02,
    help="Largest change of the Frechet distance from real pictures, as a share of fp32's; beyond it nothing is "
    "written. Takes --features and --reference.",
)
@click.option(
    "--features",
    metavar="FILE",
    type=FILE,
    help="Feature extractor of --limit-fd, an ONNX file as evaluate-vae takes it.",
)
@click.option(
    "--reference",
    metavar="PATH",
    type=click.Path(path_type=Path, exists=True),
    help="Real pictures for --limit-fd, in any form that train-vae takes.",
)
@click.option(
    "--count",
    metavar="N",
    type=click.IntRange(min=1),
    default=10_000,
    help="How many samples of fp16 and int8 are compared with fp32's.",
)
# What its card says
@click.option(
    "--name",
    metavar="NAME",
    callback=_name,
    help="The model's name on its card; serve-vae serves a file under the file's own.  [default: FILE's stem]",
)
@click.option(
    "--dataset",
    metavar="TEXT",
    default="",
    show_default=False,
    help="Text for the card: what the model was trained on.",
)
@click.option(
    "--licence",
    metavar="TEXT",
    default="",
    show_default=False,
    help="Text for the card: under what terms the model may be used.",
)
@click.option(
    "--notes",
    metavar="TEXT",
    default="",
    show_default=False,
    help="Text for the card: anything that a user should know.",
)
@needs("cpu,export")
def export(
    source: Path,
    out: Path,
    force: bool,
    precisions: tuple[str, ...],
    store: str,
    triton: Path | None,
    prior: str | None,
    normalise: str,
    plain: bool,
    with_latents: bool,
    limit_mean: float,
    limit_fd: float,
    features: Path | None,
    reference: Path | None,
    count: int,
    name: str | None,
    **card_fields: str,
) -> None:
    """Export RUN_OR_BUNDLE, a finished run directory or an fp32 bundle, as one ONNX file from noise to uint8 pixels.

    \b
    export-onnx runs/mine --out mine.onnx
    export-onnx mine.onnx --out mine-int8.onnx --precision int8

    Each file is checked before it takes its name: its samples against those of Keras (or of the bundle that it is
    made from) in batches of 1 to 256, on one thread and on two, and with noise eight times as large. fp16
    and int8 are also compared with fp32. The report is printed, and kept in the file's card.
    """
    precisions = tuple(dict.fromkeys(precisions))
    outs = _outs(out, precisions)
    for each in outs.values():
        if each.exists() and not force:
            raise click.UsageError(f"{each} exists; pass --force to replace it")
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"{out.parent} is not a folder; make it first")
    if not source.exists():
        raise click.UsageError(f"{source} is not a run directory, which train-vae makes, nor a bundle")
    if source.is_file():
        choices = ("prior", "normalise", "plain", "with_latents")
        refuse(choices, "is settled in a bundle; export the run to choose another")
    if bool(features) != bool(reference):
        raise click.UsageError("--features and --reference go together: an extractor, and pictures to measure against")
    if precisions == ("fp32",):
        refuse(
            ("limit_mean", "limit_fd", "features", "count"), "is for --precision fp16 and int8, which change samples"
        )
    elif not features:
        refuse(("limit_fd",), "takes --features and --reference: without them no Frechet distance is measured")
    name = name or name_from(out.stem.partition("@")[0], room=len("-fp32"))
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whichever backend trained: it is TensorFlow's graph that is converted
    with _clear_errors():
        from export.bundles.triton import check_free, write_repository
        from export.bundles.verify import describe
        from export.exportable import from_bundle, from_run, prior_of
        from export.pipeline import Limits, export, names

        def say(line: str) -> None:
            click.echo(line, err=True)

        began = time.monotonic()
        if triton:
            with _clear_write(triton):
                check_free(triton, list(names(name, precisions).values()), force)
        if source.is_dir():
            prior = prior_of(source, prior)
            if prior != "second-stage":
                refuse(("normalise",), f"is for second-stage samples, and these are from the prior {prior}")
            exportable = from_run(source, name, prior, normalise, with_latents, say, plain=plain, **card_fields)
        else:
            exportable = from_bundle(source, name, **card_fields)
        limits = Limits(limit_mean, limit_fd, count, features, reference)
        with _clear_write(out):
            bundles = export(exportable, outs, store, limits, say)
        for path, bundle in zip(outs.values(), bundles, strict=True):
            click.echo(f"{path}: {len(bundle.data) / 1e6:.1f} MB, sha256 {bundle.digest}")
            click.echo(describe(bundle.card.verification, bundle.card.difference))
        if triton:
            with _clear_write(triton):
                write_repository(bundles, triton, force)
    click.echo(f"{time.monotonic() - began:.1f} s in all")


@main.command(name="inspect")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@needs("cpu,export")
def inspect_bundle(file: Path, as_json: bool) -> None:
    """Show what the bundle FILE is: its card, inputs and outputs, parameters, work per sample, operators and digest."""
    with _clear_errors():
        from export.bundles.inspect import inspect, render
        from serve.bundle import load

        facts = inspect(load(file))
        click.echo(json.dumps(facts, indent=2) if as_json else render(facts))


@main.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--count", metavar="N", type=click.IntRange(min=1), default=1000, help="How many samples to compare.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@needs("cpu,export")
def diff(a: Path, b: Path, count: int, as_json: bool) -> None:
    """Compare the samples that bundles A and B make of the same noise.

    They are the same where no value differs by more than one grey level: diff then exits with 0, otherwise with 1.
    """
    with _clear_errors():
        from export.bundles.compare import compare_bundles

        found = compare_bundles(a, b, count)
    click.echo(json.dumps(found.to_dict()) if as_json else found.text(a.name, b.name))
    raise SystemExit(0 if found.worst <= 1 else 1)


def _outs(out: Path, precisions: tuple[str, ...]) -> dict[str, Path]:
    if len(precisions) == 1:
        return {precisions[0]: out}
    stem, at, version = out.stem.partition("@")  # servers take a version from the end of a file's name
    return {precision: out.with_name(f"{stem}-{precision}{at}{version}{out.suffix}") for precision in precisions}
