"""The command `export-onnx`: a run directory to one bundle. TensorFlow is imported late."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import click


def _name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise click.BadParameter("letters, digits, '.', '_' and '-', at most 64")
    return value


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", metavar="FILE", required=True, type=click.Path(path_type=Path), help="The .onnx to write.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--name", metavar="NAME", callback=_name, help="What it is served as.  [default: FILE's stem]")
@click.option(
    "--prior",
    type=click.Choice(("second-stage", "normal", "gaussian", "gmm")),
    default="second-stage",
    help="Where latents come from: both stages (GEN-2), the noise itself (GEN-1), or an ex-post density.",
)
@click.option(
    "--normalise",
    type=click.Choice(("none", "scalar", "per-dimension")),
    default="scalar",
    help="How second-stage latents get the aggregate posterior's variance.",
)
@click.option(
    "--store",
    type=click.Choice(("float32", "float16")),
    default="float32",
    help="How weights are stored; float16 halves the file. Arithmetic is float32.",
)
@click.option("--dataset", metavar="TEXT", default="", help="For the card: what it was trained on.")
@click.option("--licence", metavar="TEXT", default="", help="For the card: under what terms it may be used.")
@click.option("--notes", metavar="TEXT", default="", help="For the card: anything a user should know.")
def main(
    run: Path,
    out: Path,
    force: bool,
    name: str | None,
    prior: str,
    normalise: str,
    store: str,
    dataset: str,
    licence: str,
    notes: str,
) -> None:
    """Export RUN, a finished run directory, as one ONNX file: noise in, uint8 pixels out.

    \b
    export-onnx runs/mine --out mine.onnx

    The file is checked against Keras at batches 1, 7 and 64 before it takes its name.
    """
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; pass --force to replace it")
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"{out.parent} is not a folder; make it first")
    if not run.is_dir():
        raise click.UsageError(f"{run} is not a run directory; train-vae makes one")
    name = name or _name_from(out)
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        raise click.ClickException(
            "export needs KERAS_BACKEND=tensorflow; runs trained with any backend can be exported"
        )
    try:
        from export.errors import ExportError
        from export.export import Options, export
        from serve.errors import ServeError
        from training.errors import TrainingError
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install 'balanced-vae[cpu,export]'") from None
    began = time.monotonic()
    options = Options(name, prior, normalise, store, dataset, licence, notes)
    try:
        bundle, agreement = export(run, out, options)
    except (ExportError, ServeError, TrainingError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"cannot write {out}: {error.strerror or error}") from None
    click.echo(f"{out}: {len(bundle.data) / 1e6:.1f} MB in {time.monotonic() - began:.1f} s, sha256 {bundle.digest}")
    click.echo(
        f"against Keras at batches {', '.join(map(str, agreement.batches))}: at most {agreement.worst} grey level "
        f"apart, {agreement.mean:.2g} on average"
    )


def _name_from(out: Path) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("-._")
    return stem[:64] or "model"
