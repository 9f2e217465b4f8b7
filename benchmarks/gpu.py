"""Sampling of the embedded faces on an NVIDIA GPU, beside torch and JAX with the same network, and the GPU's limits.

    python benchmarks/gpu.py --json docs/benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --batch 4                 what of it runs without a GPU

Everything starts from noise in the host's memory and ends with uint8 pixels there, as the engine does. torch runs the
network as one would write it for torch, channels last, compiled for each batch size with CUDA graphs, and for the size
of --autotune with its slowest compiler too; JAX runs Keras' network in mixed bfloat16, jit-compiled. Their weights are
random, as speed does not depend on them. Each runtime is a process of its own, and all prepare together: what is not
ready in time is left out. Then all take turns.

The limits are a product of two large float16 matrices, as pictures a second of so many operations, and a copy within
the GPU's memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click
import numpy as np
import runtimes
from measure import Row, Table, finish, interleave, json_option, speed
from runtimes import Peers, Runtime

BACKENDS = {"ours": "tensorflow", "torch": "torch", "jax": "jax"}
COMPILED = "torch.compile, float16"
LIMIT = "a float16 matrix product"
COPY = "a copy in the GPU's memory"
SIDE = 8192  # of the matrices
COPIED = 2**30  # bytes


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--device", default="cuda", show_default=True)
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 16, 64, 256, 1024), show_default=True
)
@click.option("--autotune", default=256, show_default=True, help="The batch that torch's slowest compiler is for.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=0.3, show_default=True, help="A measurement, at least.")
@click.option("--patience", default=150.0, show_default=True, help="Seconds that a runtime may take to be ready.")
@click.option("--runtime", "names", multiple=True, type=click.Choice(list(BACKENDS)), default=tuple(BACKENDS))
@json_option
def main(
    context: click.Context,
    device: str,
    batches: tuple[int, ...],
    autotune: int,
    rounds: int,
    seconds: float,
    patience: float,
    names: tuple[str, ...],
    report: Path | None,
) -> None:
    """Print images a second, a table for each batch."""
    if context.invoked_subcommand:
        return
    from export import inspect
    from serve import load

    until = time.monotonic() + patience
    flops = inspect(load())["flops"]
    with TemporaryDirectory() as folder, ExitStack() as stack, ThreadPoolExecutor() as pool:

        def open_runtime(name: str) -> Runtime:
            words = [sys.executable, __file__, "answer", name, device, str(max(batches)), str(autotune)]
            return stack.enter_context(runtimes.runtime(name, words, {"KERAS_BACKEND": BACKENDS[name]}))

        def ready(name: str) -> tuple[Runtime, list[tuple[str, int]], list[str]]:
            process = open_runtime(name)
            found, failed = [], list(process.left_out)
            for batch, peer in product(batches, process.names):
                if time.monotonic() > until:
                    failed.append(f"{peer} in batches of {batch}: it was not ready in time")
                    continue
                try:
                    process.images(peer, batch, Path(folder) / f"{name}.npy")
                except RuntimeError as error:
                    if "AnotherBatch" not in str(error):
                        failed.append(f"{peer} in batches of {batch}: {error}")
                else:
                    found.append((peer, batch))
            return process, found, failed

        prepared, missing = [], []
        for name, future in {name: pool.submit(ready, name) for name in names}.items():
            try:
                prepared.append(future.result())
            except click.ClickException as error:
                missing.append(f"{name}: {error.message}")
        missing += [each for _, _, failed in prepared for each in failed]
        tables = []
        for batch in batches:
            work: dict[str, Callable[[], float]] = {
                peer: partial(process.measure, peer, batch, seconds)
                for process, found, _ in prepared
                for peer, of in found
                if of == batch
            }
            rows = [Row(name, "images/s", values) for name, values in interleave(work, rounds, warm=False).items()]
            title = f"The embedded faces, {flops / 1e9:.3g} GFLOP a picture, on {device} in batches of {batch}"
            tables.append(Table(title, rows, [COMPILED]))
            tables[-1].show()
        try:
            tables.append(limits(flops, rounds))
            tables[-1].show()
        except (ImportError, RuntimeError) as error:
            missing.append(f"the GPU's limits: {' '.join(str(error).split())[:200]}")
        versions = {name: each for process, _, _ in prepared for name, each in process.versions.items()}
        finish(report, __doc__, tables, missing, versions)


def limits(flops: float, rounds: int) -> Table:
    """Return what the GPU reaches at most.

    Raises:
        ImportError: there is no torch here.
        RuntimeError: there is no GPU here.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU")
    square = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.float16)
    source = torch.empty(COPIED, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(10):
                work()
            torch.cuda.synchronize()

        run()
        return speed(run, 10, 0.2)

    found = interleave(
        {LIMIT: lambda: timed(lambda: square @ square), COPY: lambda: timed(lambda: target.copy_(source))}, rounds
    )
    products = [2.0 * SIDE**3 * value for value in found[LIMIT]]
    rows = [
        Row(LIMIT, "TFLOP/s", [value / 1e12 for value in products]),
        Row(COPY, "GB/s", [2 * COPIED * value / 1e9 for value in found[COPY]]),
        Row("pictures at the speed of that product", "images/s", [value / flops for value in products]),
    ]
    return Table("The limits of the GPU", rows)


@main.command(hidden=True)
@click.argument("name", type=click.Choice(list(BACKENDS)))
@click.argument("device")
@click.argument("largest", type=int)
@click.argument("autotune", type=int)
def answer(name: str, device: str, largest: int, autotune: int) -> None:
    """Be one of the runtimes' processes."""
    make: dict[str, Callable[[], tuple[Peers, list[str]]]] = {
        "ours": partial(our_peers, device, largest),
        "torch": partial(torch_peers, device, autotune),
        "jax": jax_peers,
    }
    runtimes.answer(make[name], 64)


def our_peers(device: str, largest: int) -> tuple[Peers, list[str]]:
    """Return the engine in each arithmetic, as it is and with CUDA graphs."""
    from serve import Engine, EngineError, load
    from serve.bundle import EMBEDDED

    peers: dict[str, Callable[[Any], Any]] = {}
    left_out = []
    ways: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
    for precision, arithmetic, graphs in product(EMBEDDED, ways, (False, True)):
        name = f"ours, {precision}, {arithmetic}" + (", CUDA graphs" if graphs else "")
        try:
            engine = Engine(load(EMBEDDED[precision]), device, batch=largest, arithmetic=arithmetic, cuda_graphs=graphs)
        except EngineError as error:
            left_out.append(f"{name}: {error}")
            continue
        print(f"{name}: {engine.device}, {engine.arithmetic}, buckets {engine.buckets}, {engine.difference}")
        peers[name] = engine.compute
    return peers, left_out


class AnotherBatch(Exception):
    """A peer that was compiled for one batch only is asked for another."""


def torch_peers(device: str, autotune: int) -> tuple[Peers, list[str]]:
    """Return the network in float32 and float16, as it is and compiled."""
    import torch
    from networks import Chain

    from training import RECIPES

    place = torch.device(device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def network(half: bool) -> Any:
        chain = Chain(RECIPES["faces"]()).eval().to(place).to(memory_format=torch.channels_last)
        return chain.half() if half else chain

    def run(chain: Any, noise: Any) -> Any:
        with torch.inference_mode():
            given = torch.from_numpy(noise).to(place, next(chain.parameters()).dtype)
            return chain(given).cpu().numpy()

    slowest = torch.compile(network(True), mode="max-autotune", dynamic=False)

    def tuned(noise: Any) -> Any:
        if len(noise) != autotune:
            raise AnotherBatch
        return run(slowest, noise)

    return {
        "torch, float32": partial(run, network(False)),
        "torch, float16": partial(run, network(True)),
        COMPILED: partial(run, torch.compile(network(True), mode="reduce-overhead", dynamic=False)),
        f"{COMPILED}, max-autotune": tuned,
    }, []


def jax_peers() -> tuple[Peers, list[str]]:
    """Return Keras' network in mixed bfloat16, compiled by JAX."""
    from exporter import build

    chain = build("faces", precision="mixed_bfloat16")

    import jax  # after Keras, whose backend it is

    weights = [[each.value for each in group] for group in (chain.trainable_variables, chain.non_trainable_variables)]
    compiled = jax.jit(lambda noise: chain.stateless_call(*weights, noise)[0])
    return {"JAX jit, mixed bfloat16": lambda noise: np.asarray(compiled(noise))}, []


if __name__ == "__main__":
    main()
