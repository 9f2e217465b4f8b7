"""Sampling speed of a model: in process, and through a server as one stream.

python benchmarks/sample.py                              the embedded faces
python benchmarks/sample.py --model mine.onnx --device cuda --batch 32 --batch 256
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from measure import Row, Table, finish, interleave, json_option, speed
from runtimes import running

from serve import Client, Engine, RemoteModel, load


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Instead of the embedded faces.")
@click.option("--device", default="auto")
@click.option("--batch", "batches", multiple=True, type=int, default=(0,), help="Largest batch; 0: the device's.")
@click.option("--count", default=512, show_default=True, help="Samples a measurement.")
@click.option("--rounds", default=5, show_default=True)
@json_option
def main(
    model: Path | None, device: str, batches: tuple[int, ...], count: int, rounds: int, report: Path | None
) -> None:
    """Print images a second."""
    bundle = load(model) if model else load()
    engines = [Engine(bundle, device, batch=batch) for batch in batches]
    measured: dict[str, Callable[[], float]] = {
        f"in process, {engine.device}, batches of {engine.batch}": partial(speed, partial(_drain, engine, count), count)
        for engine in engines
    }
    first = next(iter(measured))
    words = ["--device", device, "--listen", "127.0.0.1:0", *(["--model", str(model)] if model else [])]
    command = [sys.executable, "-c", "from serve.server.cli import main; main()", *words]
    with running(command, {}, until="ready, listening on") as said, Client(said.split()[-1]) as client:
        drain = partial(_drain, client.model(), count)
        measured["through the server, one stream"] = partial(speed, drain, count)
        found = interleave(measured, rounds)
    title = f"{bundle.card.name}, {len(bundle.data) / 1e6:.1f} MB, {count} samples a measurement"
    table = Table(title, [Row(name, "images/s", values) for name, values in found.items()], [first])
    table.show()
    finish(report, __doc__, [table])


def _drain(source: Engine | RemoteModel, count: int) -> None:
    for _ in source.stream(1, 0, count):
        pass


if __name__ == "__main__":
    main()
