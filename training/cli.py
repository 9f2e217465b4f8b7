"""The command `train-vae`: flags to a recipe, pictures to a dataset, then training.

Keras is imported late: `--help` and usage errors answer at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from training.commands import needs
from training.errors import TrainingError
from training.fit.execution import Execution
from training.recipe import Recipe, parse
from training.recipes import RECIPES, recipe
from training.settings import page, text
from training.settings import settings as described

if TYPE_CHECKING:
    from training.data.dataset import Splits
    from training.record.run import Run

AUTO = "auto"
MINUTES = {"cpu": 30.0, "gpu": 15.0}  # what a person waits for


def _recipes(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(
            "What each reproduces, with the paper's scores where it has some (REC / GEN-1 / GEN-2: the Frechet\n"
            "distance of reconstructions, of samples of stage 1, of samples of both stages), and the time it takes.\n"
        )
        click.echo(
            f"{AUTO:22} Settings that fit the pictures, this machine and --minutes; what you get without --recipe."
        )
        for name, make in RECIPES.items():
            click.echo(f"{name:22} {(make.__doc__ or '').splitlines()[0]}")
        context.exit()


def _settings(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(page(Recipe()), nl=False)
        context.exit()


def _devices(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value != "all" and (not value.isdecimal() or value == "0"):
        raise click.BadParameter(f"a number of devices, or all. Received: {value!r}")
    return value


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
@click.option(
    "--list-recipes",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_recipes,
    help="List the recipes with what each reproduces and the time it takes, and exit.",
)
@click.option(
    "--list-settings",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_settings,
    help="Print every setting with its unit, default and effect, as Markdown, and exit.",
)
@click.option(
    "--data",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A folder or zip of pictures (CelebA's official split is used where it is found), a folder of CIFAR-10's or "
    "MNIST's files, .npy or .npz.",
)
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="The run directory to write. If it holds an unfinished run, the same command resumes it.",
)
@click.option(
    "--minutes",
    metavar="NUMBER",
    type=click.FloatRange(min=0, min_open=True),
    help="How long training may take on this machine; decides how large and how long without --recipe.  "
    "[default: 30 on a CPU, 15 on a GPU]",
)
@click.option(
    "--recipe",
    "name",
    metavar="NAME",
    default=AUTO,
    help="Train a named recipe, such as faces, cifar10 or rae-l2-celeba; --list-recipes shows all.",
)
@click.option(
    "--from",
    "start",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Start stage 1 from the weights of a finished run, where they fit, and not from noise.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Decide one setting, such as --set side=32 (repeatable). --dry-run prints all of them.",
)
@click.option(
    "--skip-unreadable",
    is_flag=True,
    help="Leave out pictures that cannot be decoded, instead of ending with an error.",
)
@click.option(
    "--cache",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where decoded pictures are kept for the next run.  [default: ~/.cache/balanced-vae]",
)
@click.option(
    "--save-every",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=Execution.save_every,
    help="Save the state of training this often: the most work that a kill or a power cut can cost.",
)
@click.option(
    "--steps-per-execution",
    metavar="N",
    type=click.IntRange(min=1),
    default=Execution.steps_per_execution,
    help="How many minibatches one call of the compiled training step runs; 10 or more keep a fast GPU busy.",
)
@click.option(
    "--devices",
    metavar="N|all",
    callback=_devices,
    default=Execution.devices,
    help="How many GPUs share each minibatch of stage 1, or all of them. TF_CONFIG names several machines.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan and every setting, and exit without training. Needs no --out, and a named recipe no --data.",
)
@needs("train")
def main(
    data: Path | None,
    out: Path | None,
    minutes: float | None,
    name: str,
    start: Path | None,
    settings: tuple[str, ...],
    skip_unreadable: bool,
    cache: Path | None,
    save_every: float,
    steps_per_execution: int,
    devices: str,
    dry_run: bool,
) -> None:
    """Train a two-stage VAE on pictures, or one of the models that it is compared with.

    The size of the networks and the length of training are chosen for the pictures, this machine and the minutes,
    unless a recipe is named. The balance of reconstruction and KL divergence is computed from the running error.

    \b
    train-vae --data photos/ --out runs/mine
    train-vae --data photos/ --out runs/night --minutes 480 --set side=128
    train-vae --data more-photos/ --out runs/next --from runs/mine --minutes 10
    train-vae --recipe cifar10 --data cifar-10-batches-bin/ --out runs/cifar --set epochs=20

    Ctrl-C and SIGTERM save the state of training and exit; the same command resumes. A finished run goes on with
    --set epochs=, and takes another prior with --set priors=. The environment variable KERAS_BACKEND chooses
    tensorflow (the default), jax or torch; a run is resumed on the backend that began it.
    """
    if data is None and not (dry_run and name != AUTO):
        raise click.UsageError("Missing option '--data': the pictures to train on")
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out': the run directory to write")
    if minutes is not None and name != AUTO:
        raise click.UsageError("--minutes counts without --recipe: a named recipe says itself how long it trains")
    try:
        resolved = _named(name, settings) if name != AUTO else _begun(out, settings)
        if data is None:
            assert resolved is not None
            _print(resolved)
            return
        if out is not None and not dry_run:
            _check_folders(out, start)
        resolved = resolved or _auto(data, cache, minutes, settings, start)
        if not dry_run:
            import_module("training.fit.two_stage")  # what is not installed is said before pictures are read
        splits = _load(data, resolved, skip_unreadable, cache)
        if dry_run:
            _print(resolved)
            return
        assert out is not None
        _train(resolved, splits, out, start, Execution(save_every, steps_per_execution, devices))
    except TrainingError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:  # whatever writes or reads says what itself; this is the rest
        raise click.ClickException(f"cannot use {error.filename or out}: {error.strerror or error}") from None


def _named(name: str, settings: tuple[str, ...]) -> Recipe:
    try:
        return recipe(name).set(settings)
    except TrainingError as error:
        raise click.UsageError(str(error)) from None


def _begun(out: Path | None, settings: tuple[str, ...]) -> Recipe | None:
    """Return the recipe of a run that was begun here, with the settings; None where there is none."""
    from training.record.run import Run

    if out is None or not (run := Run(out)).begun:
        parse(settings)  # an error before anything is read
        return None
    click.echo(f"going on with {out}, as it was planned: {run.recipe.name}", err=True)
    return run.recipe.set(settings)


def _check_folders(out: Path, start: Path | None) -> None:
    """Raise TrainingError where nothing can come of it, before pictures are read for minutes."""
    from training.fit.devices import is_chief
    from training.fit.warm import fingerprint
    from training.record.run import Run

    if is_chief():  # the others write nothing there
        Run(out).check_ours()
    if start:
        fingerprint(start)


def _auto(
    data: Path, cache: Path | None, minutes: float | None, settings: tuple[str, ...], start: Path | None
) -> Recipe:
    """Look at the pictures, time this machine, and return the settings that fit both; say which."""
    from training.data.survey import survey
    from training.fit.devices import workers
    from training.fit.plan import on_gpu, plan
    from training.record.progress import reading
    from training.record.run import Run

    if workers() > 1:
        raise TrainingError("each machine of TF_CONFIG would decide for itself; name a --recipe")
    like = Run(start).recipe if start else None
    with reading() as advance:
        pictures = survey(data, cache=cache, advance=advance)
    budget = minutes or MINUTES["gpu" if on_gpu() else "cpu"]
    click.echo(f"timing this machine, for {budget:g} minutes of training", err=True)
    decided = plan(pictures, budget, settings, like)
    click.echo(str(decided), err=True)
    return decided.recipe


def _load(data: Path, resolved: Recipe, skip_unreadable: bool, cache: Path | None) -> Splits:
    from training.data.dataset import load_data
    from training.record.progress import reading

    with reading() as advance:
        splits = load_data(data, resolved, skip_unreadable=skip_unreadable, cache=cache, advance=advance)
    report = splits.train.report
    click.echo(f"{report.kind}: {report}", err=True)
    for path, reason in report.broken[:10]:
        click.echo(f"  left out {path}: {reason}", err=True)
    return splits


def _print(resolved: Recipe) -> None:
    known = described(resolved)
    for key, value in resolved.to_dict().items():
        effect = f"{f'{known[key].unit}: ' if known[key].unit else ''}{known[key].effect}" if key in known else ""
        click.echo(f"{f'{key} = {text(value)}':32} # {effect}" if effect else f"{key} = {text(value)}")


def _train(resolved: Recipe, splits: Splits, out: Path, start: Path | None, execution: Execution) -> None:
    from training.fit.devices import is_chief, workers
    from training.fit.stop import Stopped, StopRequest
    from training.fit.two_stage import train
    from training.record.progress import ProgressDisplay

    stop = StopRequest()
    listening = stop.listening() if workers() == 1 else nullcontext()  # else a signal ends it at once
    try:
        with listening, ProgressDisplay() as display:
            run = train(resolved, splits, out, start=start, observer=display, stop=stop, execution=execution)
    except Stopped as stopped:
        click.echo(f"stopped and saved in {out}; the same command goes on from here", err=True)
        sys.exit(128 + stopped.signal)
    if not is_chief():
        click.echo("stage 1 is trained; the first machine goes on alone, and keeps the run", err=True)
        return
    _say_how_it_went(run, lambda line: click.echo(line, err=True))


def _say_how_it_went(run: Run, say: Callable[[str], None]) -> None:
    """Say what the run's records advise, and then that it is trained - or that its pictures are of no use."""
    from training.record.advice import at_end, collapse, outcome

    for line in at_end(run):
        say(line)
    error, diversity = outcome(run)
    sheet = "sharpened" if run.sharpened else run.default_prior
    say(
        f"error {error:.2f} and diversity {diversity:.2f} of the pictures' variance; look at "
        f"{run.path / 'samples' / f'{sheet}.png'}"
    )
    wrong = collapse(run)
    what = f"trained, but {wrong}" if wrong else "trained"
    command = shlex.join(["export-onnx", str(run.path), "--out", f"{run.path.resolve().name}.onnx"])
    say(f"{what}: {run.path}; next: {command}")
