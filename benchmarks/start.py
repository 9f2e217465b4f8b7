"""From a command to its first picture: sample-cli for one, and serve-vae until it listens, beside bare imports.

python benchmarks/start.py

Each measurement is a new process, timed from its start: sample-cli to its end, a server until it says that it is
ready, which it does once all sizes of batches have run. Imports alone are what neither can do without: NumPy, ONNX
Runtime and, for the server, gRPC.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from measure import Row, Table, finish, interleave, json_option
from runtimes import seconds

BIN = Path(sys.executable).parent
IMPORTS = "imports alone"


@click.command()
@click.option("--device", "devices", multiple=True, default=("cpu", "openvino"), show_default=True)
@click.option("--rounds", default=9, show_default=True)
@json_option
def main(devices: tuple[str, ...], rounds: int, report: Path | None) -> None:
    """Print seconds."""
    missing = [each for each in devices if each == "openvino" and not find_spec(each)]
    with TemporaryDirectory() as temporary:
        pictures: dict[str, Callable[[], float]] = {IMPORTS: partial(imports, "numpy, onnxruntime")}
        servers: dict[str, Callable[[], float]] = {IMPORTS: partial(imports, "numpy, onnxruntime, grpc")}
        for device in devices:
            if device in missing:
                continue
            for precision in ("fp32", "int8"):
                words = ["--n", "1", "--device", device, "--precision", precision]
                pictures[f"sample-cli --n 1, {precision}, {device}"] = partial(first_picture, words, Path(temporary))
            servers[f"serve-vae, {device}"] = partial(ready, ["--device", device, "--listen", "127.0.0.1:0"])
        tables = []
        for title, work in (("From start to the first picture", pictures), ("From start to listening", servers)):
            found = interleave(work, rounds)
            tables.append(Table(title, [Row(name, "s", values) for name, values in found.items()], [IMPORTS]))
            tables[-1].show()
    finish(report, __doc__, tables, [f"{each}: it is not installed here" for each in missing])


def imports(names: str) -> float:
    """Return the seconds of a process that imports these and ends."""
    return seconds([sys.executable, "-c", f"import {names}"])


def first_picture(words: list[str], folder: Path) -> float:
    """Return the seconds of a sample-cli into an empty folder."""
    with TemporaryDirectory(dir=folder) as out:
        return seconds([BIN / "sample-cli", *words, "--out", out])


def ready(words: list[str]) -> float:
    """Return the seconds until a server listens, and end it."""
    began = time.perf_counter()
    with subprocess.Popen([BIN / "serve-vae", *words], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = ""
        for line in server.stderr:
            if "ready, listening on" in line:
                break
        else:
            raise click.ClickException(f"serve-vae should listen. Received: {line.strip() or 'nothing'}")
        took = time.perf_counter() - began
        server.terminate()
        server.stderr.read()
    return took


if __name__ == "__main__":
    main()
