"""The command `sample-cli`."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from serve import flags
from serve.address import check_address

if TYPE_CHECKING:
    from serve.model import GenerativeModel
    from serve.stop import StopRequest

MOST = 10**8  # samples in one folder


def _grid(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", value)
    if not match or "0" in match.groups():
        raise click.BadParameter(f"COLUMNSxROWS, such as 10x10. Received: {value!r}")
    return int(match[1]), int(match[2])


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"a number from 0 to 100. Received: {value}")
    return value


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return value if value is None else check_address(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _format(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return "jpeg" if value == "jpg" else value


def _refuse_what_has_no_effect(server: str | None, model: str) -> None:
    """Raise UsageError for an option on the command line (not in the environment) that nothing would come of."""
    context = click.get_current_context()
    for here, where, names in (
        (server is not None, "with --server", ("token", "wait", *flags.TLS)),
        (server is None, "without --server", ("device", "arithmetic", "threads", "batch")),
        (server is None and not model, "on the embedded faces, without --model and --server", ("precision",)),
    ):
        for name in names:
            if not here and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} has an effect only {where}")


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
# Which pictures
@click.option(
    "--n", "count", metavar="N", type=click.IntRange(1, MOST), required=True, help="How many pictures to make."
)
@click.option(
    "--out",
    metavar="FOLDER",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write into.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    help="Seed of the noise: another seed gives other pictures.",
)
@click.option("--start", metavar="N", type=click.IntRange(0, 2**63 - 1), default=0, help="Index of the first sample.")
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0, 100),
    default=1.0,
    callback=_finite,
    help="Scale of the noise: below 1 gives plainer pictures, above 1 stranger ones.",
)
# How they are kept
@click.option(
    "--format",
    "kind",
    type=click.Choice(("png", "jpeg", "jpg", "webp", "npy")),
    default="png",
    callback=_format,
    help="Format of the files. npy: an array of 1000 pictures in each.",
)
@click.option(
    "--grid",
    metavar="[COLUMNSxROWS]",
    is_flag=False,
    flag_value="10x10",
    callback=_grid,
    help="Also write grid.png, a contact sheet of the first pictures (10x10 where no size is given).",
)
@click.option(
    "--mix", is_flag=True, help="Write even into a folder that holds other files, replacing those of equal names."
)
# Who makes them
@click.option(
    "--model",
    metavar="FILE",
    default="",
    show_default=False,
    help="The bundle to sample from; with --server, a model there by its NAME, or NAME@VERSION for another than the "
    "newest.  [default: the embedded faces]",
)
@click.option(
    "--precision",
    type=click.Choice(("fp32", "int8")),
    help="Which of the two embedded faces models: int8 is faster on a CPU and rounds a little.  [default: fp32]",
)
@click.option(
    "--server", metavar="HOST:PORT", callback=_address, help="Have the pictures made by the serve-vae at this address."
)
@click.option(
    "--token",
    metavar="TOKEN",
    default="",
    show_default=False,
    envvar="SAMPLE_TOKEN",
    show_envvar=True,
    help="Bearer token that --server asks for.",
)
@click.option(
    "--wait",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    default=10.0,
    help="How long to wait where nobody listens at --server yet, since it may be starting.",
)
@flags.tls
@click.option(
    "--device",
    metavar="NAME",
    default="auto",
    help="Without --server, the device to run on: cpu, openvino, cuda, cuda:1, tensorrt; auto: the first available.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(("exact", "fast")),
    default="exact",
    help="Without --server. exact: float32, the same pictures on every device to one grey level. fast: the fastest "
    "that the device has, such as bfloat16; its difference is measured and said. A folder holds pictures of one only.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(0, 1024),
    default=0,
    help="Without --server, CPU threads; 0: all cores.",
)
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(0, 4096),
    default=0,
    help="Without --server, the largest batch; 0: the device's own.",
)
def main(
    count: int,
    out: Path,
    seed: int,
    start: int,
    temperature: float,
    kind: str,
    grid: tuple[int, int] | None,
    mix: bool,
    model: str,
    precision: str | None,
    server: str | None,
    token: str,
    wait: float,
    device: str,
    arithmetic: Literal["exact", "fast"],
    threads: int,
    batch: int,
    **tls: Any,
) -> None:
    """Make N pictures, samples START to START + N - 1 of a seed, and write them into a folder.

    \b
    sample-cli --n 1000 --out faces/ --grid
    sample-cli --n 5 --seed 7 --start 100 --out five/
    sample-cli --server 127.0.0.1:8470 --n 1000 --out faces/

    The same seed and index give the same picture every time. On a folder that is not complete, the same command
    makes what is missing or damaged. Only one sample-cli at a time can write to a folder.
    """
    if start + count > 2**63:
        raise click.UsageError(f"--start + --n must be 2^63 or less. Received: {start} + {count}")
    _refuse_what_has_no_effect(server, model)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would add lines of its own
    from serve.stop import Stopped, StopRequest

    stop = StopRequest()
    from serve import job
    from serve.errors import ServeError

    def done(more: int) -> None:
        stop.check()
        bar.update(more)

    try:
        with ExitStack() as stack:
            sampled = (
                _remote(stack, stop, server, model, token=token, start=wait, **tls)
                if server is not None
                else _local(model, precision or "fp32", device, threads, batch, arithmetic)
            )
            wanted = job.Job(sampled.name, sampled.digest, sampled.arithmetic, seed, start, count, temperature, kind)
            label = f"{sampled.name} seed {seed}"
            began = time.monotonic()
            stack.enter_context(job.hold(out))
            with click.progressbar(length=count, label=label, show_pos=True, file=sys.stderr) as bar:
                made = job.run(wanted, sampled, out, mix, done)
            seconds = time.monotonic() - began
            speed = f" in {seconds:.1f} s ({made / seconds:,.0f} images/s)" if made else ""
            click.echo(f"{made:,} made{speed}, {count - made:,} were there: {out}")
            if grid:
                click.echo(f"contact sheet: {job.grid(wanted, sampled, out, *grid)}")
    except (Stopped, ServeError) as error:
        if stop.signal is None:
            raise click.ClickException(str(error)) from None
        click.echo(f"stopped; the same command completes {out}", err=True)
        raise SystemExit(128 + stop.signal) from None


def _remote(stack: ExitStack, stop: StopRequest, server: str, model: str, **options: Any) -> GenerativeModel:
    from serve.client import Client, Options

    client = stack.enter_context(Client(server, Options(**options)))
    stop.wake = client.close  # whoever waits for the server stops waiting
    name, _, version = model.partition("@")
    return client.model(name, version)


def _local(
    model: str, precision: str, device: str, threads: int, batch: int, arithmetic: Literal["exact", "fast"]
) -> GenerativeModel:
    from serve.bundle import EMBEDDED, load
    from serve.engine import Engine

    engine = Engine(load(model or EMBEDDED[precision]), device, threads, batch, arithmetic=arithmetic)
    if engine.difference:
        click.echo(f"computing in {engine.arithmetic}: {engine.difference}", err=True)
    return engine
