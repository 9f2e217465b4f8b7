"""The command `train-vae`: flags to a recipe, pictures to a dataset, then training.

Keras is imported late: `--help` and usage errors answer at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from training.errors import TrainingError
from training.recipes import RECIPES, Recipe, recipe

if TYPE_CHECKING:
    from training.dataset import Dataset


def _recipes(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        for make in RECIPES.values():
            click.echo(f"{make.__name__:10} {(make.__doc__ or '').splitlines()[0]}")
        context.exit()


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
@click.option("--list-recipes", is_flag=True, is_eager=True, expose_value=False, callback=_recipes, help="Name them.")
@click.option("--recipe", "name", metavar="NAME", required=True, help=f"One of {', '.join(RECIPES)}.")
@click.option(
    "--data",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path),
    help="Pictures of any format and size (recursive), or CIFAR-10's binary files.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path),
    help="Run directory. The same command on an unfinished one goes on with it.",
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change a setting of the recipe (repeatable)."
)
@click.option("--skip-unreadable", is_flag=True, help="Leave broken pictures out instead of stopping at them.")
@click.option("--dry-run", is_flag=True, help="Check the data, print the recipe, and stop.")
def main(name: str, data: Path, out: Path, settings: tuple[str, ...], skip_unreadable: bool, dry_run: bool) -> None:
    """Train a two-stage VAE on pictures, its balance computed from the running error.

    \b
    train-vae --recipe faces --data photos/ --out runs/mine
    train-vae --recipe cifar10 --data cifar-10-batches-bin/ --out runs/cifar --set epochs=20

    Ctrl-C or SIGTERM saves and ends; the same command resumes. KERAS_BACKEND chooses tensorflow
    (default), jax or torch.
    """
    from training.dataset import load

    try:
        resolved = recipe(name).set(settings)
    except TrainingError as error:
        raise click.UsageError(str(error)) from None

    try:
        dataset = load(data, resolved, skip_unreadable)
        report = dataset.report
        click.echo(
            f"{report.read:,} pictures read, {len(report.broken):,} broken, {report.ignored:,} ignored", err=True
        )
        for path, reason in report.broken[:10]:
            click.echo(f"  left out {path}: {reason}", err=True)
        if dry_run:
            for key, value in resolved.to_dict().items():
                click.echo(f"{key} = {value}")
            return
        _train(resolved, dataset, out)
    except TrainingError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error.strerror or error}") from None
    click.echo(f"trained: {out}; next: export-onnx {out} --out model.onnx", err=True)


def _train(resolved: Recipe, dataset: Dataset, out: Path) -> None:
    try:
        from training.progress import Watch
        from training.run import Run
        from training.stage import Stopped, StopRequest
        from training.twostage import train_two_stages
    except ImportError as error:
        raise click.ClickException(f"{error}; pip install 'balanced-vae[train]'") from None
    run = Run(out)
    run.open(resolved, {"count": len(dataset), "digest": dataset.digest})
    stop = StopRequest()
    try:
        with stop.listening(), Watch() as watch:
            train_two_stages(resolved, dataset, run, watch, stop)
    except Stopped as stopped:
        click.echo(f"stopped and saved in {out}; the same command goes on from here", err=True)
        sys.exit(128 + stopped.signal)
