"""What sample-cli does: fills a store, writes to a pipe, shows pictures, or verifies what is there."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from serve import flags, screen

MOST_SHOWN = 100  # of the pictures of a folder, as many as its contact sheet has where no size is given

if TYPE_CHECKING:
    from serve.bulk.cluster import Cluster
    from serve.bulk.job import Job
    from serve.bulk.sweep import Sweep
    from serve.bulk.wanted import Wanted
    from serve.bundle import Bundle
    from serve.model import GenerativeModel
    from serve.stop import StopRequest


def fill(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Complete a folder, or an object store's."""
    from serve.bulk import run
    from serve.bulk.cluster import Cluster
    from serve.bulk.report import Report
    from serve.bulk.store import open_store

    store = open_store(wanted.out)
    looking = _looking(wanted)
    source = (
        Cluster(wanted.ray, _bundle(wanted), wanted.device, wanted.arithmetic, wanted.workers)
        if wanted.ray is not None
        else _model(wanted, stack, stop)
    )
    job, (part, parts) = _job(wanted, source), wanted.part or (0, 1)
    kept = stack.enter_context(run.held(job, store, wanted.mix, part if wanted.part else None))
    report = Report(wanted.reporting, f"{source.name} seed {job.seed}", -(-job.count // parts))

    def done(more: int, size: int, made: bool) -> None:
        stop.check()
        report.more(more, size, made)

    with report.running():
        if isinstance(source, Cluster):
            found = source.complete(kept, wanted.out, done, job.count)
        else:
            found = run.complete(kept, source, store, done, count=job.count, part=part, parts=parts)
    if not wanted.part and kept == job:
        run.finish(kept, source.card, store, found.receipts)
    report.end(wanted.out, found.made, found.found)
    if wanted.part:
        report.say(
            f"part {part} of {parts}; once all are made, the same command without --part ends the job", part=part
        )
    if isinstance(source, Cluster):
        return
    if wanted.grid or (wanted.show and not looking):
        sheet = f"{wanted.out.rstrip('/')}/{run.grid(job, source, store, *(wanted.grid or (10, 10)), stop.check)}"
        report.say(f"contact sheet: {sheet}", sheet=sheet)
    if looking:
        _show(looking, wanted, job.count, source, stop)


def show(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Show pictures on the terminal, and keep none."""
    looking = screen.Screen()
    _show(looking, wanted, wanted.count or 0, _model(wanted, stack, stop), stop)


def sweep(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Make the pictures between two samples, or samples at several temperatures; keep them, show them, or both."""
    from serve.bulk.report import Report
    from serve.bulk.store import open_store
    from serve.bulk.sweep import complete, made

    store = open_store(wanted.out) if wanted.out else None
    looking = _looking(wanted)
    model, wish = _model(wanted, stack, stop), _sweep(wanted)
    report = Report(wanted.reporting, f"{model.name} seed {wanted.seed}", wish.total)

    def done(more: int) -> None:
        stop.check()
        report.more(more, 0)

    with report.running():
        if store is None:
            images = made(wish, model, done)
        else:
            images = complete(wish, model, store, wanted.kind, wanted.mix, done)
    if store is not None:
        place = f"{wanted.out.rstrip('/')}/{wish.shown}"
        report.say(f"{wish.total:,} made: {wanted.out}, best seen in {place}", sweep=place, made=wish.total)
    if looking:
        for heading, row in wish.rows(images):
            looking.draw(row, heading)


def pipe(wanted: Wanted, stack: ExitStack, stop: StopRequest) -> None:
    """Write a tar to stdout."""
    from serve.bulk.run import tar_stream
    from serve.errors import JobError

    if sys.stdout is None:
        raise JobError("--out - writes to stdout, and that is closed")
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
    report = Report(
        wanted.reporting, f"verifying {job.model} seed {job.seed}", max(1, round(job.count * wanted.fraction))
    )

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
    bad = [f"missing: {found.missing:,} of {found.files:,} files, such as {found.absent}"] if found.missing else []
    if found.wrong:
        bad.append(
            f"damaged, or other pictures: {len(found.wrong):,} of {found.tried:,} that were made again, such as "
            f"{found.wrong[0]}; remove these"
        )
    if bad:
        raise JobError(f"{'; '.join(bad)}; the command that made {place} makes what is missing")


def _looking(wanted: Wanted) -> screen.Screen | None:
    """Return the terminal to show pictures on, if that is wanted and somebody looks."""
    return screen.Screen() if wanted.show and screen.there() else None


def _show(looking: screen.Screen, wanted: Wanted, count: int, model: GenerativeModel, stop: StopRequest) -> None:
    from numpy import concatenate

    batches = []
    for _, images in model.stream(wanted.seed, wanted.start, min(count, MOST_SHOWN), wanted.temperature):
        stop.check()
        batches.append(images)
    looking.draw(concatenate(batches))
    if count > MOST_SHOWN and not wanted.quiet:
        click.echo(f"these are the first {MOST_SHOWN} of {count:,}")


def _sweep(wanted: Wanted) -> Sweep:
    from serve.bulk.sweep import Interpolation, TemperatureSweep

    if wanted.interpolate is not None:
        return Interpolation(wanted.seed, *wanted.interpolate, wanted.steps, wanted.temperature)
    return TemperatureSweep(wanted.seed, wanted.start, wanted.count or 0, wanted.temperatures or ())


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
    stop.wake_by(client.close)  # whoever waits for the server stops waiting
    name, _, version = model.partition("@")
    return client.model(name, version)


def _local(wanted: Wanted) -> GenerativeModel:
    from serve.engine import Engine

    bundle = _bundle(wanted)
    engine = Engine(bundle, wanted.device, wanted.threads, wanted.batch, arithmetic=wanted.arithmetic)
    if engine.difference and not wanted.quiet:
        click.echo(f"computing in {engine.arithmetic}: {engine.difference}", err=True)
    return engine
