"""What sample-cli does: fills a store, writes to a pipe, or verifies what is there."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import click

from serve import flags

if TYPE_CHECKING:
    from serve.bulk.cluster import Cluster
    from serve.bulk.job import Job
    from serve.bundle import Bundle
    from serve.model import GenerativeModel
    from serve.stop import StopRequest


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

    @property
    def way(self) -> str:
        """How to report."""
        return "json" if self.as_json else "quiet" if self.quiet else "text"


def fill(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Complete a folder, or an object store's."""
    from serve.bulk import run
    from serve.bulk.cluster import Cluster
    from serve.bulk.report import Report
    from serve.bulk.store import open_store

    store = open_store(wanted.out)
    source = (
        Cluster(wanted.ray, _bundle(wanted), wanted.device, wanted.arithmetic, wanted.workers)
        if wanted.ray is not None
        else _model(wanted, stack, stop)
    )
    job, (part, parts) = _job(wanted, source), wanted.part or (0, 1)
    kept = stack.enter_context(run.held(job, store, wanted.mix, part if wanted.part else None))
    report = Report(wanted.way, f"{source.name} seed {job.seed}", -(-job.count // parts))

    def done(more: int, size: int) -> None:
        stop.check()
        report.more(more, size)

    with report.running():
        if isinstance(source, Cluster):
            found = source.complete(kept, wanted.out, done)
        else:
            found = run.complete(kept, source, store, done, count=job.count, part=part, parts=parts)
    if not wanted.part and kept == job:
        run.finish(kept, source.card, store, found.receipts)
    report.end(wanted.out, found.made, found.found)
    if wanted.part:
        report.say(
            f"part {part} of {parts}; once all are made, the same command without --part ends the job", part=part
        )
    if wanted.grid and not isinstance(source, Cluster):
        sheet = f"{wanted.out.rstrip('/')}/{run.grid(job, source, store, *wanted.grid)}"
        report.say(f"contact sheet: {sheet}", sheet=sheet)


def pipe(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Write a tar to stdout."""
    from serve.bulk.run import tar_stream

    model = _model(wanted, stack, stop)
    job = _job(replace(wanted, kind="webdataset"), model)
    for data in tar_stream(job, model):
        stop.check()
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def verify(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """See that a store is what its manifest says."""
    from serve.bulk.report import Report
    from serve.bulk.run import manifest
    from serve.bulk.store import open_store
    from serve.bulk.verify import verify as verified
    from serve.errors import JobError

    place = wanted.verify or ""
    store = open_store(place)
    job = manifest(store)
    if job is None:
        raise JobError(f"{place} has no manifest.json; name what sample-cli wrote")
    model = _model(wanted, stack, stop)
    report = Report(wanted.way, f"verifying {job.model} seed {job.seed}", max(1, round(job.count * wanted.fraction)))

    def done(more: int) -> None:
        stop.check()
        report.more(more, 0)

    with report.running():
        found = verified(job, model, store, wanted.fraction, done)
    near = f", {found.near:,} to one grey level" if found.near else ""
    report.say(
        f"{found.files:,} files; of {found.tried:,} that were made again, {found.same:,} are the same bytes{near}",
        verified=place,
        files=found.files,
        tried=found.tried,
        same=found.same,
        near=found.near,
        missing=found.missing,
        wrong=found.wrong[:100],
    )
    if found.wrong:
        bad = found.tried - found.same - found.near
        raise JobError(
            f"of its files {found.missing:,} are missing, and of those that were made again {bad:,} are missing, "
            f"damaged or other pictures, such as {found.wrong[0]}; remove these, and make them again by the command "
            "that made them"
        )


def _job(wanted: Wanted, model: GenerativeModel | Cluster) -> Job:
    from serve.bulk.job import make

    return make(
        model.name,
        model.digest,
        model.arithmetic,
        seed=wanted.seed,
        start=wanted.start,
        count=wanted.count or 0,
        temperature=wanted.temperature,
        kind=wanted.kind,
        shard=wanted.shard,
        encoding=wanted.encoding,
    )


def _bundle(wanted: Wanted) -> Bundle:
    from serve.bundle import EMBEDDED, load

    return load(wanted.model or EMBEDDED[wanted.precision or "fp32"])


def _model(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> GenerativeModel:
    if wanted.server is None:
        return _local(wanted)
    tls = {name: getattr(wanted, name) for name in flags.TLS}
    return _remote(stack, stop, wanted.server, wanted.model, token=wanted.token, start=wanted.wait, **tls)


def _remote(stack: ExitStack, stop: StopRequest, server: str, model: str, **options: Any) -> GenerativeModel:
    from serve.client import Client, Fleet, Options

    addresses, how = server.split(","), Options(**options)
    client: Client | Fleet = Client(server, how) if len(addresses) == 1 else Fleet(addresses, how)
    stack.callback(client.close)
    stop.wake = client.close  # whoever waits for the server stops waiting
    name, _, version = model.partition("@")
    return client.model(name, version)


def _local(wanted: Wanted) -> GenerativeModel:
    from serve.engine import Engine

    bundle = _bundle(wanted)
    engine = Engine(bundle, wanted.device, wanted.threads, wanted.batch, arithmetic=wanted.arithmetic)
    if engine.difference and not wanted.quiet:
        click.echo(f"computing in {engine.arithmetic}: {engine.difference}", err=True)
    return engine
