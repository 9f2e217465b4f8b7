"""How time and memory grow with what there is of something: fitted exponents, and plots.

python benchmarks/growth.py --plot docs/growth.png

Each point is measured in a process of its own: the seconds of the work alone, and the peak memory of all. An exponent
is the slope of the logarithms' line through the larger half of the sizes, where starting costs no longer count: 1 is in
proportion, 0 does not depend on it. Above 1 by more than noise is a defect. Folders, and what is read for training, are
of small pictures that cost nothing to make; a picture of more pixels is made by a chain that has a scale more for
every doubling of the side, so that its operations grow a little faster than its pixels, and whose conversion takes most
of its memory.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
from measure import Row, Table, finish, json_option
from runtimes import running

from serve import Client, Engine, load
from serve.bulk.job import make
from serve.bulk.run import complete, held
from serve.bulk.store import open_store
from serve.model import Images
from serve.noise import Noise

SIDE = 16  # of pictures that cost nothing to make
REQUESTS = 4  # of each client, for one sample


# Takes how many, a folder, and what is closed after the work; returns the work.
Prepare = Callable[[int, Path, ExitStack], Callable[[], None]]


class Free(Engine):
    """An engine whose pictures cost nothing: small, and all the same."""

    def __init__(self) -> None:
        super().__init__(load(), "cpu", batch=256)
        self.images = np.random.default_rng(0).integers(0, 256, (self.batch, SIDE, SIDE, 3), np.uint8)

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        return self.images[:count]


def folder(kind: str) -> Prepare:
    """Return what prepares the making of a folder of so many samples."""

    def prepared(size: int, scratch: Path, closing: ExitStack) -> Callable[[], None]:
        engine = Free()
        store = open_store(str(scratch / "out"))

        def work() -> None:
            job = make(engine.name, engine.digest, engine.arithmetic, count=size, kind=kind)
            with held(job, store) as kept:
                complete(kept, engine, store)

        return work

    return prepared


def batch(size: int, scratch: Path, closing: ExitStack) -> Callable[[], None]:
    """Prepare one batch of the embedded faces."""
    return _batch(Engine(load(), "cpu", batch=size))


def clients(size: int, scratch: Path, closing: ExitStack) -> Callable[[], None]:
    """Prepare so many clients of one server, all of which ask at once."""
    words = ["-c", "from serve.server.cli import main; main()", "--listen", f"unix:{scratch / 'socket'}"]
    said = closing.enter_context(running([sys.executable, *words], {}, until="ready, listening on"))
    address = said.split()[-1]

    def work() -> None:
        with ExitStack() as stack, ThreadPoolExecutor(size) as pool:
            models = [stack.enter_context(Client(address)).model() for _ in range(size)]
            list(pool.map(lambda model: [model.sample(0, at, 1) for at in range(REQUESTS)], models))

    return work


def rows(size: int, scratch: Path, closing: ExitStack) -> Callable[[], None]:
    """Prepare reading so many pictures of an array, and a hundred minibatches of them."""
    from training import Recipe, load_data

    shape = (size, SIDE, SIDE, 3)
    np.lib.format.open_memmap(scratch / "x.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    generator = np.random.default_rng(0)

    def work() -> None:
        data = load_data(scratch / "x.npy", Recipe(side=SIDE, num_scale=2), cache=scratch / "cache").train
        for _ in range(100):
            data.batch(generator.integers(0, size, 32), generator)

    return work


def pixels(size: int, scratch: Path, closing: ExitStack) -> Callable[[], None]:
    """Prepare a batch of pictures with so many pixels each, by an untrained chain."""
    from exporter import build, packed

    from export.convert import convert
    from export.passes import optimise

    chain = build("faces", side=math.isqrt(size), base_dim=8)
    graph = convert(chain)
    optimise(graph)
    return _batch(Engine(packed(graph, chain), "cpu", batch=8))


GROWTHS: dict[str, tuple[tuple[int, ...], Prepare]] = {
    "samples in a folder, npy": ((100, 1000, 10_000, 100_000, 1_000_000), folder("npy")),
    "samples in a folder, png": ((100, 1000, 10_000, 50_000), folder("png")),
    "samples in a batch": ((1, 4, 16, 64, 256), batch),
    "pixels in a picture": ((32**2, 64**2, 128**2, 256**2), pixels),
    "clients of a server": ((1, 4, 16, 64, 256), clients),
    "training pictures": ((1000, 10_000, 100_000, 1_000_000), rows),
}


@click.group(invoke_without_command=True)
@click.pass_context
@click.option(
    "--points", type=click.IntRange(1), default=5, show_default=True, help="Of each, the smallest sizes first."
)
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Draw the points there, as PNG.")
@json_option
def main(context: click.Context, points: int, plot: Path | None, report: Path | None) -> None:
    """Print the points, a table for each growth, and their exponents."""
    if context.invoked_subcommand:
        return
    told: dict[str, dict[int, dict[str, float]]] = {}
    tables = []
    for what, (sizes, _) in GROWTHS.items():
        found = told[what] = {size: _child(what, size) for size in sizes[:points]}
        time_of, memory_of = (exponent({size: each[unit] for size, each in found.items()}) for unit in ("s", "MB"))
        rows = [Row(f"{size:,}", unit, [each[unit]]) for unit in ("s", "MB") for size, each in found.items()]
        tables.append(Table(f"{what.capitalize()}: exponent {time_of:.2f} in time, {memory_of:.2f} in memory", rows))
        tables[-1].show()
    if plot:
        _draw(told, plot)
    finish(report, __doc__, tables)


@main.command()
@click.argument("what", type=click.Choice(tuple(GROWTHS)))
@click.argument("size", type=int)
def point(what: str, size: int) -> None:
    """Measure one point in this process; print it as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        with ExitStack() as closing:
            work = GROWTHS[what][1](size, Path(scratch), closing)
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
        # Of children that have ended, too.
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps({"s": seconds, "MB": sum(peaks) / 1e3}))


def exponent(values: dict[int, float]) -> float:
    """Return the slope of log value over log size, through the larger half of the sizes."""
    larger = sorted(values)[len(values) // 2 :] if len(values) > 2 else sorted(values)
    sizes, found = np.log(larger), np.log([values[size] for size in larger])
    return float(np.polyfit(sizes, found, 1)[0]) if len(larger) > 1 else 0.0


def _batch(engine: Engine) -> Callable[[], None]:
    noise: Noise = np.zeros((engine.batch, engine.card.noise_size), np.float32)
    engine.compute(noise)  # the first compares this size with another

    def work() -> None:
        engine.compute(noise)

    return work


def _child(what: str, size: int) -> dict[str, float]:
    words = [sys.executable, __file__, "point", what, str(size)]
    result = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _draw(told: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=100, layout="constrained")
    both = figure.subplots(1, 2)
    for axes, unit in zip(both, ("s", "MB"), strict=True):
        for what, found in told.items():
            axes.loglog(list(found), [each[unit] for each in found.values()], marker="o", label=what)
        axes.set(xlabel="how many", ylabel=unit)
        axes.grid(alpha=0.3)
    low, high = both[0].get_xlim()
    both[0].loglog([low, high], [low * 1e-4, high * 1e-4], "k:", label="in proportion", scalex=False, scaley=False)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


if __name__ == "__main__":
    main()
