"""What serving costs: images/s through the server over those of the engine in process, latency, and the wire alone.

    python benchmarks/server.py
    python benchmarks/server.py --triton pytriton/tritonserver --litserve lit/bin/python    (see peers.py)
    python benchmarks/server.py --stream 100000      one stream read to its end

The engine alone, clients of our server, and the same number of clients of the peers take turns. Latency is that of
half the load that the server can take.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np
import numpy.typing as npt
from measure import Row, Table, finish, interleave, json_option, speed
from runtimes import running

from serve import Client, Engine, load

if TYPE_CHECKING:
    from peers import Peer  # itself later: Triton's client and our server's stubs cannot share a process

CLIENTS = (1, 8, 64)
SIZES = (1, 16, 1000)
SHORT = 16  # samples of a request whose latency is told
BESIDE = ((8, 1), (8, 16), (64, 1), (64, 16))  # clients and samples a request that peers are asked for too
WARM = 0.5  # of a measurement's seconds, before it begins

ALONE = "engine in process"
AFTER = f"{ALONE}, just after"

Images = npt.NDArray[np.uint8]
# (seed, start, count) to pictures, as they come.
Ask = Callable[[int, int, int], Iterator[Images]]


class Null:
    """An engine that costs nothing: the same real pictures every time."""

    def __init__(self, engine: Engine) -> None:
        self.card, self.digest, self.arithmetic = engine.card, engine.digest, engine.arithmetic
        self.device, self.batch = "null", 256
        self._images = np.tile(engine.sample(0, 0, 32), (8, 1, 1, 1))

    def compute(self, noise: npt.NDArray[np.float32]) -> Images:
        return self._images[: len(noise)]


class Ours:
    """serve-vae, over a connection for each client."""

    name = "serve-vae"

    def __init__(self, address: str) -> None:
        self.address = address

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        with Client(self.address) as client:
            model = client.model()

            def ask(seed: int, start: int, count: int) -> Iterator[Images]:
                if count <= model.batch:
                    yield model.sample(seed, start, count)
                else:
                    yield from (images for _, images in model.stream(seed, start, count))

            yield ask


@contextmanager
def connect(peer: Peer) -> Iterator[Ask]:
    """Connect to a peer, which gives all of a request at once."""
    with peer.connect() as whole:
        yield lambda seed, start, count: iter([whole(seed, start, count)])


@contextmanager
def ours(words: list[str]) -> Iterator[Ours]:
    """Run our server until the block ends."""
    with running([sys.executable, *words], {}, until="ready, listening on") as said:
        yield Ours(said.strip().splitlines()[-1].split()[-1])


def rate(connects: list[Callable[[], AbstractContextManager[Ask]]], count: int, seconds: float) -> float:
    """Return the images a second of clients that each ask for `count` samples, again as soon as they have them.

    Each client is timed from one arrival to another, and all go on until the last has been: where pictures arrive in
    bursts, how many of them happen to fall into a fixed time says little.
    """
    rates = [0.0] * len(connects)
    left = set(range(len(connects)))

    def drain(number: int, ask: Ask, begin: float) -> None:
        made, first = 0, None
        try:
            for turn in itertools.count():
                for images in ask(number, turn * count, count):
                    made += len(images)
                    now = time.monotonic()
                    if first is None and now >= begin:
                        first = now, made
                    elif first is not None and now >= begin + seconds and number in left:
                        rates[number] = (made - first[1]) / (now - first[0])
                        left.discard(number)
                    if not left:
                        return
        finally:
            left.discard(number)

    with ExitStack() as stack, ThreadPoolExecutor(len(connects)) as pool:
        asks = [stack.enter_context(each()) for each in connects]
        begin = time.monotonic() + WARM * seconds
        for each in [pool.submit(drain, number, ask, begin) for number, ask in enumerate(asks)]:
            each.result()
    return sum(rates)


def latencies(server: Ours, count: int, requests_a_second: float, seconds: float) -> list[float]:
    """Return the seconds that requests took which arrived at random, whatever became of those before."""
    chance, taken = random.Random(0), []
    with ExitStack() as stack, ThreadPoolExecutor(64) as pool:
        asks = [stack.enter_context(server.connect()) for _ in range(64)]
        idle = list(asks)

        def one(due: float) -> None:
            ask = idle.pop()
            try:
                for _ in ask(1, int(due * 1e6) % 10**6, count):
                    pass
            finally:
                idle.append(ask)
            taken.append(time.monotonic() - due)

        due = began = time.monotonic()
        asked = []
        while due < began + seconds:
            due += chance.expovariate(requests_a_second)
            time.sleep(max(0.0, due - time.monotonic()))
            asked.append(pool.submit(one, due))
        for each in asked:
            each.result()
    return sorted(taken)


def wire(address: Ours, encoding: str, clients: int, seconds: float, picture: int) -> float:
    """Return the MB of pixels a second that a null engine's streams bring."""

    @contextmanager
    def files() -> Iterator[Ask]:
        with Client(address.address) as client:
            model = client.model()
            one = np.empty(1, np.uint8)
            yield lambda seed, start, count: (one for _ in model.files(seed, start, count))

    return rate([address.connect if encoding == "raw" else files] * clients, 100_000, seconds) * picture / 1e6


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Instead of the embedded faces.")
@click.option("--device", default="auto", show_default=True)
@click.option("--arithmetic", default="exact", type=click.Choice(["exact", "fast"]), show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="A measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--clients", "numbers", multiple=True, type=click.IntRange(1), default=CLIENTS, show_default=True)
@click.option("--size", "sizes", multiple=True, type=click.IntRange(1), default=SIZES, show_default=True)
@click.option("--stream", default=0, metavar="N", help="Also read one stream of N samples to its end.")
@click.option("--triton", "triton_folder", type=click.Path(path_type=Path, exists=True))
@click.option("--litserve", "litserve_python", type=click.Path(path_type=Path, exists=True))
@click.option("--null", is_flag=True, hidden=True, help="Be the server with the null engine.")
@json_option
def main(
    model: Path | None,
    device: str,
    arithmetic: Literal["exact", "fast"],
    seconds: float,
    rounds: int,
    numbers: tuple[int, ...],
    sizes: tuple[int, ...],
    stream: int,
    triton_folder: Path | None,
    litserve_python: Path | None,
    null: bool,
    report: Path | None,
) -> None:
    """Print tables."""
    if null:
        asyncio.run(_serve_nothing(model))
        return
    bundle = load(model) if model else load()
    engine = Engine(bundle, device, arithmetic=arithmetic)
    title = f"{bundle.card.name}, {engine.device}, {engine.arithmetic}"
    chosen = ["--model", str(model)] if model else []
    words = ["-c", "from serve.server.cli import main; main()", "--listen", "127.0.0.1:0", "--device", device]
    words += ["--arithmetic", arithmetic, *chosen]
    # Each runs only while it is measured: LitServe takes a tenth of a core even when nobody asks.
    peers: dict[str, Callable[[], AbstractContextManager[Peer]]] = {}
    if triton_folder:
        from peers import triton

        peers["Triton"] = partial(triton, triton_folder, bundle, 0)
    if litserve_python:
        from peers import litserve

        peers["LitServe"] = partial(litserve, litserve_python, bundle, 0)
    with ours(words) as server:
        work: dict[tuple[int, str], Callable[[], float]] = {}
        for size in sizes:
            work[size, ALONE] = partial(rate, [_in_process(engine)], size, seconds)
            for clients in numbers:
                work[size, f"serve-vae, {clients} clients"] = partial(rate, [server.connect] * clients, size, seconds)
                for name, start in peers.items() if (clients, size) in BESIDE else ():
                    work[size, f"{name}, {clients} clients"] = partial(_rate_of, start, clients, size, seconds)
        long = "serve-vae, one stream of 100,000 (its beginning)"
        work[max(sizes), long] = partial(rate, [server.connect], 100_000, seconds)
        found = interleave(work, rounds, warm=False)  # each has a warm-up of its own
        tables = [
            Table(
                f"{title}, requests of {size}",
                [Row(name, "images/s", values) for (of, name), values in found.items() if of == size],
                [ALONE],
            )
            for size in sizes
        ]
        for size in (size for size in sizes if size <= SHORT):
            clients = sorted(numbers)[len(numbers) // 2]
            half = statistics.median(found[size, f"serve-vae, {clients} clients"]) / 2
            took = latencies(server, size, half / size, 5 * seconds)
            p50, p99 = (1e3 * took[min(len(took) - 1, int(len(took) * part))] for part in (0.5, 0.99))
            rows = [Row("p50", "ms", [p50]), Row("p99", "ms", [p99])]
            load_title = f"{half:.0f} images/s in requests of {size} ({len(took)} of them)"
            tables.append(Table(f"{title}, latency at half load, {load_title}", rows))
        if stream:
            tables.append(_whole_stream(title, server, engine, stream, seconds))
    with ours([__file__, "--null", *chosen]) as nothing:
        picture = int(np.prod(bundle.card.image_shape))
        ways = {
            f"{encoding}, {clients} streams": partial(wire, nothing, encoding, clients, seconds, picture)
            for encoding, clients in itertools.product(("raw", "png"), (1, 8))
        }
        found_wire = interleave(ways, rounds, warm=False)
        rows = [Row(name, "MB/s of pixels", values) for name, values in found_wire.items()]
        tables.append(Table(f"{title}, the wire alone: an engine that costs nothing", rows))
    for table in tables:
        table.show()
    finish(report, __doc__, tables)


def _in_process(engine: Engine) -> Callable[[], AbstractContextManager[Ask]]:
    @contextmanager
    def connect() -> Iterator[Ask]:
        yield lambda seed, start, count: (images for _, images in engine.stream(seed, start, count))

    return connect


def _rate_of(start: Callable[[], AbstractContextManager[Peer]], clients: int, size: int, seconds: float) -> float:
    with start() as peer:
        return rate([partial(connect, peer)] * clients, size, seconds)


def _whole_stream(title: str, server: Ours, engine: Engine, count: int, seconds: float) -> Table:
    with server.connect() as ask:
        whole = speed(lambda: sum(len(images) for images in ask(1, 0, count)), count)
    alone = rate([_in_process(engine)], 1000, seconds)
    rows = [Row("serve-vae, the whole stream", "images/s", [whole]), Row(AFTER, "images/s", [alone])]
    return Table(f"{title}, one stream of {count:,}", rows, [AFTER])


async def _serve_nothing(model: Path | None) -> None:
    # The public interface has no server for an engine of one's own.
    from serve.server.app import App
    from serve.server.settings import Settings
    from serve.server.telemetry import log_to_stderr

    log_to_stderr("text")
    settings = Settings(listen="127.0.0.1:0", http="127.0.0.1:0", model=(model,) if model else (), device=("cpu",))
    app = App(settings, lambda bundle: [Null(Engine(bundle, "cpu"))])
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await app.start()
    await stopping.wait()
    await app.stop(1)


if __name__ == "__main__":
    main()
