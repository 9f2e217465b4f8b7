"""How the cost of a bulk job grows: sample-cli in one process, and on a Ray cluster that is up, on the same cores.

python benchmarks/cluster.py

Each measurement is a whole job, from the start of its command to its end, into an empty folder: Parquet in shards of
10,000, encoded as PNG. Counts above --repeated are measured once. A worker computes in one thread, and one process in
as many as there are workers; beside these both encode.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from measure import Row, Table, finish, interleave, json_option
from runtimes import seconds

from serve.bulk.cluster import LOOPBACK
from serve.bundle import DEFAULT, load

BIN = Path(sys.executable).parent


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A model file; without, the faces.")
@click.option("--count", "counts", multiple=True, default=(1000, 20_000), show_default=True)
@click.option("--workers", "sizes", multiple=True, default=(1, 2), show_default=True)
@click.option("--shard", default=10_000, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--repeated", default=100_000, show_default=True, help="The largest count measured in all rounds.")
@json_option
def main(
    model: Path | None,
    counts: tuple[int, ...],
    sizes: tuple[int, ...],
    shard: int,
    rounds: int,
    repeated: int,
    report: Path | None,
) -> None:
    """Print seconds, and pictures a second."""
    os.environ.setdefault(*LOOPBACK)
    try:
        utils = import_module("ray.cluster_utils")
    except ImportError:
        raise click.ClickException("Ray is missing; pip install '.[cpu,bulk,ray]' in the checkout") from None
    height, width, _ = load(model or DEFAULT).card.image_shape
    words = ["--device", "cpu", "--format", "parquet", "--shard", str(shard)]
    words += ["--model", str(model)] if model else []
    tables = []
    with ExitStack() as stack:
        here = {"num_cpus": max(sizes), "include_dashboard": False}
        cluster = utils.Cluster(initialize_head=True, head_node_args=here)
        stack.callback(cluster.shutdown)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        for count in counts:
            work = {}
            for size in sizes:
                for name, how in (
                    (f"one process, threads: {size}", ["--threads"]),
                    (f"Ray, workers: {size}", ["--ray", cluster.address, "--workers"]),
                ):
                    work[name] = partial(job, folder, [*words, "--n", str(count), *how, str(size)])
            found = interleave(work, rounds if count <= repeated else 1, warm=count <= repeated)
            rows = [Row(name, "s", values) for name, values in found.items()]
            rows += [Row(name, "images/s", [count / each for each in values]) for name, values in found.items()]
            against = [name for name in work if name.startswith("one")]
            tables.append(Table(f"{count:,} pictures of {width} x {height}", rows, against))
            tables[-1].show()
    finish(report, __doc__, tables)


def job(folder: Path, words: list[str]) -> float:
    """Return the seconds of a sample-cli into an empty folder."""
    with TemporaryDirectory(dir=folder) as out:
        return seconds([BIN / "sample-cli", *words, "--out", out])


if __name__ == "__main__":
    main()
