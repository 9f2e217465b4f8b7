"""The command `sample-cli`."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from serve import flags
from serve.address import check_address
from serve.bulk.commands import fill, pipe, show, sweep, verify
from serve.bulk.wanted import PICTURES, STDOUT, Wanted, check

if TYPE_CHECKING:
    from serve.stop import StopRequest

MOST = 10**12  # samples of one job
MOST_CELLS = 10_000  # pictures on a contact sheet, which are in memory at once
MOST_STEPS, MOST_TEMPERATURES = 256, 16  # pictures of a sweep are in memory at once, and seen at once


def _grid(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", value)
    columns, rows = map(int, match.groups()) if match else (0, 0)
    if not 0 < columns * rows <= MOST_CELLS:
        raise click.BadParameter(f"COLUMNSxROWS of up to {MOST_CELLS:,} pictures, such as 10x10. Received: {value!r}")
    return columns, rows


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"a number from 0 to 100. Received: {value}")
    return value


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return value if value is None else ",".join(map(check_address, value.split(",")))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _format(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return "jpeg" if value == "jpg" else value


def _temperatures(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        found = tuple(float(each) for each in value.split(","))
    except ValueError:
        found = ()
    if not 2 <= len(set(found)) == len(found) <= MOST_TEMPERATURES or not all(0 <= each <= 100 for each in found):
        raise click.BadParameter(
            f"2 to {MOST_TEMPERATURES} different numbers from 0 to 100, such as .5,.7,1. Received: {value!r}"
        )
    return found


def _part(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
    if not match or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f"I/N with 0 <= I < N, such as 0/8. Received: {value!r}")
    return int(match[1]), int(match[2])


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
# Which pictures
@click.option("--n", "count", metavar="N", type=click.IntRange(1, MOST), help="How many pictures to make.")
@click.option(
    "--out",
    metavar="FOLDER",
    default="",
    show_default=False,
    help="Folder to write into, or a URL of an object store (s3://bucket/faces), or - to write a tar to a pipe.",
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
@click.option(
    "--interpolate",
    metavar="A B",
    type=click.IntRange(0, 2**63 - 1),
    nargs=2,
    help="Make the pictures on the way from sample A to sample B, instead of N samples, and an animation, way.webp.",
)
@click.option(
    "--steps",
    metavar="N",
    type=click.IntRange(2, MOST_STEPS),
    default=30,
    help="With --interpolate, how many pictures, both ends among them.",
)
@click.option(
    "--temperatures",
    metavar="T,T,...",
    callback=_temperatures,
    help="Make the N samples at each of these temperatures, such as .5,.7,1, with a sheet of all, temperatures.png, "
    "and an animation, temperatures.webp.",
)
# How they are kept
@click.option(
    "--format",
    "kind",
    type=click.Choice(("png", "jpeg", "jpg", "webp", "npy", "parquet", "webdataset")),
    default="png",
    callback=_format,
    help="Format of the files. npy: an array of 1000 pictures in each; parquet, webdataset: 10000, encoded.",
)
@click.option(
    "--shard",
    metavar="N",
    type=click.IntRange(0, 10**6),
    default=0,
    help="Pictures in each file of npy, parquet or webdataset; 0: the format's own.",
)
@click.option(
    "--encoding",
    type=click.Choice(PICTURES),
    default="png",
    help="What the pictures in parquet and webdataset are encoded as.",
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
    "--show",
    is_flag=True,
    help="Show the pictures, 100 at most, on the terminal, also without --out. Where there is no terminal, say "
    "which file to look at: grid.png, which is written for that, or way.webp, or temperatures.png.",
)
@click.option(
    "--mix", is_flag=True, help="Write even into a folder that holds other files, replacing those of equal names."
)
@click.option(
    "--verify",
    metavar="FOLDER",
    help="Make nothing: see that a folder, or a URL, is what its manifest says, by making a part of it again.",
)
@click.option(
    "--fraction",
    metavar="F",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    help="With --verify, how much of it; one file at least.",
)
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Say all as lines of JSON.")
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
    "--server",
    metavar="HOST:PORT",
    callback=_address,
    help="Have the pictures made by the serve-vae at this address, or by several: HOST:PORT,HOST:PORT.",
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
    help="Without --server, the device to run on: cpu, openvino, cuda, cuda:1, tensorrt; auto: a GPU or else the CPU.",
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
@click.option(
    "--part",
    metavar="I/N",
    callback=_part,
    help="Make the I-th of N parts only, 0 <= I < N, beside processes that make the others. Then once without, to end.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Have a Ray cluster make the files, each worker with a device of its own; auto: the cluster that this machine "
    "belongs to; local: this machine alone.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(0, 10**5),
    default=0,
    help="With --ray, the most workers; 0: as many as there is room for.",
)
def main(**options: Any) -> None:
    """Make N pictures, samples START to START + N - 1 of a seed, and write them into a folder.

    \b
    sample-cli --n 1000 --out faces/ --grid
    sample-cli --n 5 --seed 7 --start 100 --out five/
    sample-cli --n 1000000 --out s3://bucket/faces --format parquet
    sample-cli --server 127.0.0.1:8470 --n 1000 --out faces/
    sample-cli --n 8 --show
    sample-cli --seed 7 --interpolate 3 9 --out way/
    sample-cli --seed 7 --temperatures .5,.7,1 --n 8 --out warm/
    sample-cli --verify faces/

    The same seed and index give the same picture every time. On a folder that is not complete, the same command
    makes what is missing or damaged. Only one sample-cli at a time can write to a folder.
    """
    wanted = Wanted(**options)
    check(wanted)
    if wanted.quiet:
        logging.getLogger("serve").setLevel(logging.ERROR)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would add lines of its own
    from serve.stop import Stopped, StopRequest

    stop = StopRequest()
    from serve.errors import ServeError

    try:
        with ExitStack() as stack:
            _action(wanted)(wanted, stack, stop)
    except (Stopped, ServeError) as error:
        if stop.signal is None:
            raise click.ClickException(str(error)) from None
        resumable = wanted.verify is None and wanted.out not in ("", STDOUT)
        click.echo(f"stopped; the same command completes {wanted.out}" if resumable else "stopped", err=True)
        raise SystemExit(128 + stop.signal) from None


def _action(wanted: Wanted) -> Callable[[Wanted, ExitStack, StopRequest], None]:
    if wanted.verify is not None:
        return verify
    if wanted.sweeps:
        return sweep
    if wanted.out == STDOUT:
        return pipe
    return fill if wanted.out else show
