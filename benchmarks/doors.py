"""Pictures by URL beside gRPC: the same server asked through both of its doors, one picture a request, and its gallery.

    python benchmarks/doors.py
    python benchmarks/doors.py --chromium /usr/bin/chromium      a page with its first 64 pictures, too

With an engine that costs nothing, the doors are all that there is to measure.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from importlib.util import find_spec
from itertools import count as numbers
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
from measure import Row, Table, finish, interleave, json_option
from runtimes import running
from server import Ask, Images, Ours, rate

from serve import Client, load

ONE = np.empty(1, np.uint8)  # stands for a picture's file
GRPC = "gRPC, pixels"


@dataclass
class Doors:
    """A server's two addresses.

    Attributes:
        grpc: HOST:PORT.
        url: Where its pictures are.
    """

    grpc: str
    url: str

    @contextmanager
    def pixels(self) -> Iterator[Ask]:
        """Ask for raw pictures by gRPC."""
        with Ours(self.grpc).connect() as ask:
            yield ask

    @contextmanager
    def files(self) -> Iterator[Ask]:
        """Ask for PNGs by gRPC."""
        with Client(self.grpc) as client:
            model = client.model()

            def ask(seed: int, start: int, count: int) -> Iterator[Images]:
                return (ONE for _ in model.files(seed, start, count))

            yield ask

    @contextmanager
    def pictures(self, digest: str) -> Iterator[Ask]:
        """Ask for PNGs by URL, over one connection."""
        with self.connected() as get:

            def ask(seed: int, start: int, count: int) -> Iterator[Images]:
                get(f"/v1/digests/{digest}/samples/{seed}/{start}.png")
                yield ONE

            yield ask

    @contextmanager
    def connected(self) -> Iterator[Callable[[str], bytes]]:
        """Connect by HTTP."""
        parts = urlsplit(self.url)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60)

        def get(path: str) -> bytes:
            connection.request("GET", path)
            reply = connection.getresponse()
            body = reply.read()
            if reply.status != 200:
                raise RuntimeError(f"{path}: {reply.status} {body.decode()}")
            return body

        try:
            yield get
        finally:
            connection.close()


@contextmanager
def doors(words: list[str]) -> Iterator[Doors]:
    """Run a server until the block ends."""
    with running([sys.executable, *words], {}, until="ready, listening on") as said:
        (url,) = re.findall(r"pictures at (\S+)", said)
        yield Doors(said.strip().splitlines()[-1].split()[-1], url)


def grid(get: Callable[[str], bytes], digest: str, seeds: Iterator[int]) -> float:
    """Return the milliseconds that 64 pictures take, which nobody has asked for before."""
    began = time.perf_counter()
    get(f"/v1/digests/{digest}/grid/{next(seeds)}/0.webp?columns=8&rows=8")
    return 1e3 * (time.perf_counter() - began)


def visit(browser: Any, url: str, seeds: Iterator[int]) -> float:
    """Return the milliseconds until a browser that was never here shows 64 pictures, nobody having asked before."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    began = time.perf_counter()
    page.goto(f"{url}/?seed={next(seeds)}")
    page.wait_for_function("() => document.querySelectorAll('.block:first-child .part').length === 64", polling=10)
    took = 1e3 * (time.perf_counter() - began)
    page.context.close()
    return took


def another(page: Any, seeds: Iterator[int]) -> float:
    """Return the milliseconds until a page that is open shows 64 pictures of another seed."""
    seed = str(next(seeds))
    began = time.perf_counter()
    page.fill("#seed", seed)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "(seed) => document.querySelectorAll('.block:first-child .part').length === 64"
        " && document.querySelector('.cell').ariaLabel.endsWith(`seed ${seed}`)",
        arg=seed,
        polling=10,
    )
    took = 1e3 * (time.perf_counter() - began)
    page.wait_for_load_state("networkidle")
    return took


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="Instead of the embedded faces.")
@click.option("--device", default="auto", show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="A measurement.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--clients", default=64, show_default=True)
@click.option("--chromium", type=click.Path(path_type=Path, exists=True), help="The browser's program.")
@json_option
def main(
    model: Path | None,
    device: str,
    seconds: float,
    rounds: int,
    clients: int,
    chromium: Path | None,
    report: Path | None,
) -> None:
    """Print tables."""
    if chromium and find_spec("playwright") is None:
        raise click.ClickException("--chromium takes pip install '.[test]' in the checkout, or playwright")
    bundle = load(model) if model else load()
    chosen = ["--model", str(model)] if model else []
    words = ["-c", "from serve.server.cli import main; main()", "--device", device, "--listen", "127.0.0.1:0"]
    null = [str(Path(__file__).with_name("server.py")), "--null"]
    tables = []
    for title, how in (
        (f"{bundle.card.name}, one picture a request, {clients} clients", [*words, "--http", "127.0.0.1:0", *chosen]),
        (f"{bundle.card.name}, the same of an engine that costs nothing", [*null, *chosen]),
    ):
        with doors(how) as both:
            found = interleave(
                {
                    GRPC: partial(rate, [both.pixels] * clients, 1, seconds),
                    "gRPC, PNG": partial(rate, [both.files] * clients, 1, seconds),
                    "HTTP, PNG": partial(rate, [partial(both.pictures, bundle.digest)] * clients, 1, seconds),
                },
                rounds,
                warm=False,
            )
            rows = [Row(name, "images/s", values) for name, values in found.items()]
            tables.append(Table(title, rows, [GRPC, "gRPC, PNG"]))
    with doors([*words, "--http", "127.0.0.1:0", *chosen]) as both, ExitStack() as stack:
        get, seeds = stack.enter_context(both.connected()), numbers()
        firsts: dict[str, Callable[[], float]] = {"the file": partial(grid, get, bundle.digest, seeds)}
        if chromium:
            from playwright.sync_api import sync_playwright

            program = stack.enter_context(sync_playwright()).chromium
            browser = program.launch(executable_path=chromium, args=["--no-sandbox"])
            stack.callback(browser.close)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(both.url)
            page.wait_for_load_state("networkidle")
            firsts["the gallery, open in Chromium, at another seed"] = partial(another, page, seeds)
            firsts["a first visit to it, in a profile that is new"] = partial(visit, browser, both.url, seeds)
        found = interleave(firsts, rounds)
        rows = [Row(name, "ms", values) for name, values in found.items()]
        tables.append(Table(f"{bundle.card.name}, 64 pictures as a grid", rows))
    for table in tables:
        table.show()
    left = [] if chromium else ["the gallery: --chromium names a browser"]
    finish(report, __doc__, tables, left)


if __name__ == "__main__":
    main()
