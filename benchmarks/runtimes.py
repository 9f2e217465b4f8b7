"""Processes beside the one that measures: runtimes that measure when they are asked to, and servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure import installed, speed

ROOT = Path(__file__).parents[1]
START = 60  # seconds that a server may take to listen, and to end

# Noise float32 [n, noise_size] to images uint8 [n, height, width, channels].
Peers = Mapping[str, Callable[[Any], Any]]


class Runtime:
    """A process that runs some of the peers.

    Attributes:
        names: Of these peers.
        left_out: Those that it cannot run, and why.
        versions: Of what is installed where it runs.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name
        hello = self._answer()
        self.names, self.left_out, self.versions = hello["names"], hello["left_out"], hello["versions"]

    def measure(self, peer: str, batch: int, seconds: float) -> float:
        """Return a peer's images a second, over at least so many seconds.

        Raises:
            RuntimeError: it cannot make them.
        """
        return float(self._ask(peer=peer, batch=batch, seconds=seconds)["speed"])

    def images(self, peer: str, batch: int, path: Path) -> Any:
        """Return a peer's images of the first noise; the peer is warm then, and compiled for this batch.

        Raises:
            RuntimeError: it cannot make them.
        """
        self._ask(peer=peer, batch=batch, images=str(path))
        return np.load(path).astype(np.int16)

    def _ask(self, **words: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the process for {self._name} should answer. Received: its end; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def runtime(name: str, words: Sequence[str], settings: Mapping[str, str]) -> Iterator[Runtime]:
    """Run a runtime's process until the block ends.

    Args:
        name: The runtime's.
        words: A command that calls `answer`.
        settings: Environment variables, beside those of this process.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, text=True, env=os.environ | {"PYTHONPATH": path, **settings}, stdin=pipe, stdout=pipe
    ) as process:
        try:
            yield Runtime(process, name)
        finally:
            process.kill()


@contextmanager
def running(words: Sequence[str], environment: dict[str, str], until: str) -> Iterator[str]:
    """Run a command until the block ends; give what it printed until it printed `until`.

    Raises:
        click.ClickException: it ended before, or took too long.
    """
    settings = os.environ | {"ORT_DISABLE_TELEMETRY": "1"} | environment
    with tempfile.NamedTemporaryFile("w") as log:
        # In a session of its own Ctrl-C does not reach it: it would be told twice to end, and leave its children.
        process = subprocess.Popen(words, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            began = time.monotonic()
            while until not in (said := Path(log.name).read_text(errors="replace")):
                if process.poll() is not None or time.monotonic() - began > START:
                    last = (said.strip().splitlines() or ["nothing"])[-1]
                    raise click.ClickException(f"{words[0]} should serve within {START} s. Received: {last}")
                time.sleep(0.1)
            yield said
        finally:
            process.terminate()
            process.wait(START)


def seconds(words: Sequence[str | Path]) -> float:
    """Return the seconds of a command, from its start to its end.

    Raises:
        click.ClickException: it failed.
    """
    began = time.perf_counter()
    result = subprocess.run(words, capture_output=True, text=True)
    took = time.perf_counter() - began
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise click.ClickException(f"{Path(words[0]).name} should exit with 0. Received: {result.returncode}; {last}")
    return took


def answer(make: Callable[[], tuple[Peers, list[str]]], size: int) -> None:
    """Say which peers there are, and then answer each line of the input, until it ends.

    Args:
        make: Returns the peers, and those that cannot run, and why.
        size: Values of noise a sample.
    """
    from serve.noise import draw

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else libraries print is no answer

    def tell(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    peers, left_out = make()
    tell(names=list(peers), left_out=left_out, versions=installed())
    for line in sys.stdin:
        asked = json.loads(line)
        run = partial(peers[asked["peer"]], draw(0, 0, asked["batch"], size))
        try:
            if "images" in asked:
                np.save(asked["images"], run())
                tell()
            else:
                tell(speed=speed(run, asked["batch"], asked["seconds"]))
        except Exception as error:  # compilers raise anything; the others still take part
            tell(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
