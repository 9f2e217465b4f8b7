"""Sampling speed of a model: in process and through a server, in one interleaved run; medians.

python benchmarks/sample.py                              the embedded faces
python benchmarks/sample.py --model mine.onnx --device cuda --batch 32 --batch 256
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from serve.bundle import DEFAULT, load
from serve.client import Client, RemoteModel
from serve.engine import Engine


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--device", default="auto")
@click.option("--batch", "batches", multiple=True, type=int, default=(0,), help="Largest batch; 0: the device's.")
@click.option("--count", default=512, show_default=True, help="Samples a measurement.")
@click.option("--rounds", default=5, show_default=True)
def main(model: Path, device: str, batches: tuple[int, ...], count: int, rounds: int) -> None:
    """Print images a second."""
    bundle = load(model)
    measured: dict[str, Callable[[], None]] = {}
    for batch in batches:
        engine = Engine(bundle, device, batch=batch)
        measured[f"in process, {engine.device}, batches of {engine.batch}"] = partial(_drain, engine, count)
    words = ["--model", str(model), "--device", device, "--listen", "127.0.0.1:0"]
    command = [sys.executable, "-c", "from serve.server.cli import main; main()", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if "ready, listening on" in line)
        with Client(address) as client:
            remote = client.model()
            measured["through the server, one stream"] = partial(_drain, remote, count)
            seconds: dict[str, list[float]] = {name: [] for name in measured}
            for _ in range(rounds):
                for name, run in measured.items():
                    began = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - began)
        server.terminate()
    print(f"{bundle.card.name}, {len(bundle.data) / 1e6:.1f} MB, {count} samples a measurement, median of {rounds}")
    for name, times in seconds.items():
        print(f"{name:50} {count / statistics.median(times):9.1f} images/s")


def _drain(source: Engine | RemoteModel, count: int) -> None:
    for _ in source.stream(1, 0, count):
        pass


if __name__ == "__main__":
    main()
