"""What the command sample-cli is asked for: its options as typed, and which of these go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import click
from click.core import ParameterSource

from serve import flags, screen

STDOUT = "-"
PICTURES = ("png", "jpeg", "webp")
MOST_SAMPLES = 64  # of a sweep of temperatures: all its pictures are in memory at once


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The command's options, as typed."""

    count: int | None
    out: str
    seed: int
    start: int
    temperature: float
    kind: str
    shard: int
    encoding: str
    grid: tuple[int, int] | None
    mix: bool
    verify: str | None
    fraction: float
    quiet: bool
    as_json: bool
    model: str
    precision: str | None
    server: str | None
    token: str
    wait: float
    tls: bool
    ca: Any
    cert: Any
    key: Any
    device: str
    arithmetic: Literal["exact", "fast"]
    threads: int
    batch: int
    part: tuple[int, int] | None
    ray: str | None
    workers: int
    interpolate: tuple[int, int] | None
    steps: int
    temperatures: tuple[float, ...] | None
    show: bool

    @property
    def sweeps(self) -> bool:
        """Whether a few pictures are wanted that differ in one thing."""
        return self.interpolate is not None or self.temperatures is not None

    @property
    def reporting(self) -> str:
        """How to report."""
        return "json" if self.as_json else "quiet" if self.quiet else "text"


def check(wanted: Wanted) -> None:
    """Raise UsageError for options that contradict each other, have no effect, or are missing."""
    _refuse_what_has_no_effect(wanted)
    for name, other in (("quiet", wanted.quiet), ("show", wanted.show)):
        if wanted.as_json and other:
            raise click.UsageError(f"expected --{name} or --json. Received: both")
    if wanted.verify is not None:
        return
    if not wanted.count and wanted.interpolate is None:
        raise click.UsageError("expected --n and --out, or --verify. Received: no --n")
    if not wanted.out and not wanted.show:
        raise click.UsageError("expected --n and --out, or --show, or --verify. Received: no --out")
    if not wanted.out and not screen.there():
        raise click.UsageError("--show takes a terminal, for input and output, or --out for a file. Received: neither")
    if wanted.start + (wanted.count or 0) > 2**63:
        raise click.UsageError(f"--start + --n must be 2^63 or less. Received: {wanted.start} + {wanted.count}")
    given = click.get_current_context().get_parameter_source("kind") is ParameterSource.COMMANDLINE
    if wanted.sweeps:
        if wanted.kind not in PICTURES or wanted.out == STDOUT:
            received = "--out -" if wanted.out == STDOUT else f"--format {wanted.kind}"
            raise click.UsageError(
                f"--interpolate and --temperatures write a folder of --format png, jpeg or webp. Received: {received}"
            )
        if wanted.temperatures and (wanted.count or 0) > MOST_SAMPLES:
            raise click.UsageError(f"--n is {MOST_SAMPLES} at most with --temperatures. Received: {wanted.count}")
    if wanted.out == STDOUT and given and wanted.kind != "webdataset":
        raise click.UsageError(f"--out - is a tar, --format webdataset. Received: --format {wanted.kind}")
    if wanted.ray is not None and wanted.kind not in ("npy", "parquet", "webdataset"):
        raise click.UsageError(f"--ray takes --format npy, parquet or webdataset. Received: {wanted.kind}")


def _refuse_what_has_no_effect(wanted: Wanted) -> None:
    """Raise UsageError for an option on the command line (not in the environment) that nothing would come of."""
    context = click.get_current_context()
    server, ray, kind = wanted.server, wanted.ray, wanted.kind
    made, files, shards = wanted.verify is None, wanted.out != STDOUT, kind in ("parquet", "webdataset")
    kept = bool(wanted.out) or not wanted.show
    which = ("count", "out", "seed", "start", "temperature", "interpolate", "temperatures", "kind", "shard", "encoding")
    how = ("part", "ray", "grid", "show", "mix")
    for here, where, names in (
        (server is not None, "with --server", ("token", "wait", *flags.TLS)),
        (server is None, "without --server", ("device", "arithmetic", "threads", "batch", "ray")),
        (server is None and not wanted.model, "on the embedded faces, without --model and --server", ("precision",)),
        (shards or kind == "npy", "with --format npy, parquet or webdataset", ("shard",)),
        (shards, "with --format parquet or webdataset", ("encoding",)),
        (files, "where --out is no pipe", ("shard", "part", "ray", "grid", "mix", "show")),
        (ray is not None, "with --ray", ("workers",)),
        (ray is None, "without --ray", ("part", "batch", "threads", "grid", "show")),
        (made, "without --verify, which reads it from the manifest", which + how),
        (not made, "with --verify", ("fraction",)),
        (wanted.interpolate is not None, "with --interpolate", ("steps",)),
        (wanted.interpolate is None, "without --interpolate", ("count", "start", "temperatures")),
        (wanted.temperatures is None, "without --temperatures", ("temperature",)),
        (not wanted.sweeps, "without --interpolate and --temperatures", ("part", "ray", "grid")),
        (kept, "with --out", ("kind", "grid", "mix", "part", "ray")),
    ):
        for name in names:
            if not here and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    f"--{ {'count': 'n', 'kind': 'format'}.get(name, name) } has an effect only {where}"
                )
