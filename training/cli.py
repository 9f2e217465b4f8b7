"""The command `train-vae`: flags to a recipe, pictures to a dataset, then training.

Keras is imported late: `--help` and usage errors answer at once.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import click

from training.commands import needs
from training.errors import TrainingError
from training.fit.execution import Execution
from training.recipes import RECIPES, recipe


def _recipes(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        for name, make in RECIPES.items():
            click.echo(f"{name:22} {(make.__doc__ or '').splitlines()[0]}")
        context.exit()


def _devices(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value != "all" and (not value.isdecimal() or value == "0"):
        raise click.BadParameter(f"a number of devices, or all. Received: {value!r}")
    return value


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
@click.option("--list-recipes", is_flag=True, is_eager=True, expose_value=False, callback=_recipes, help="Name them.")
@click.option(
    "--recipe", "name", metavar="NAME", required=True, help="What to train: faces, cifar10, rae-l2-celeba ..."
)
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder or zip of pictures (CelebA's split is found), CIFAR-10 or MNIST files, .npy or .npz.",
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
@click.option("--cache", metavar="FOLDER", type=click.Path(path_type=Path), help="Where decoded pictures are kept.")
@click.option(
    "--save-every",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=Execution.save_every,
    help="Work that a power cut may cost.",
)
@click.option(
    "--steps-per-execution",
    metavar="N",
    type=click.IntRange(min=1),
    default=Execution.steps_per_execution,
    help="Minibatches a call of the compiled step; 10 or more keep a fast GPU busy.",
)
@click.option(
    "--devices",
    metavar="N|all",
    callback=_devices,
    default=Execution.devices,
    help="GPUs that share each minibatch of stage 1; several machines by TF_CONFIG.",
)
@click.option("--dry-run", is_flag=True, help="Check the data, print the recipe, and stop.")
@needs("train")
def main(
    name: str,
    data: Path,
    out: Path,
    settings: tuple[str, ...],
    skip_unreadable: bool,
    cache: Path | None,
    save_every: float,
    steps_per_execution: int,
    devices: str,
    dry_run: bool,
) -> None:
    """Train a two-stage VAE on pictures, its balance computed from the running error - or a competitor of it.

    \b
    train-vae --recipe faces --data photos/ --out runs/mine
    train-vae --recipe cifar10 --data cifar-10-batches-bin/ --out runs/cifar --set epochs=20
    train-vae --recipe rae-l2-celeba --data celeba/ --out runs/rae --set priors=gmm,second-stage

    Ctrl-C or SIGTERM saves and ends; the same command resumes. KERAS_BACKEND chooses tensorflow
    (default), jax or torch, once for all of a run.
    """
    from training.data.dataset import load_data
    from training.fit.stop import Stopped, StopRequest
    from training.record.progress import ProgressDisplay, reading

    try:
        resolved = recipe(name).set(settings)
    except TrainingError as error:
        raise click.UsageError(str(error)) from None

    try:
        with reading() as advance:
            splits = load_data(data, resolved, skip_unreadable=skip_unreadable, cache=cache, advance=advance)
        report = splits.train.report
        click.echo(f"{report.kind}: {report}", err=True)
        for path, reason in report.broken[:10]:
            click.echo(f"  left out {path}: {reason}", err=True)
        if dry_run:
            for key, value in resolved.to_dict().items():
                click.echo(f"{key} = {','.join(map(str, value)) if isinstance(value, list) else value}")
            return
        from training.fit.devices import workers
        from training.fit.two_stage import train

        stop = StopRequest()
        execution = Execution(save_every, steps_per_execution, devices)
        listening = stop.listening() if workers() == 1 else nullcontext()  # else a signal ends it at once
        with listening, ProgressDisplay() as display:
            train(resolved, splits, out, observer=display, stop=stop, execution=execution)
    except Stopped as stopped:
        click.echo(f"stopped and saved in {out}; the same command goes on from here", err=True)
        sys.exit(128 + stopped.signal)
    except TrainingError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:  # whatever writes or reads says what itself; this is the rest
        raise click.ClickException(f"cannot use {error.filename or out}: {error.strerror or error}") from None
    click.echo(f"trained: {out}; next: export-onnx {out} --out model.onnx", err=True)
