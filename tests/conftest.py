"""What the tests share: drawn pictures, one small trained run, its bundle, a server."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image, ImageDraw

BIN = Path(sys.executable).parent
HOMES = {
    "train-vae": "training.cli",
    "evaluate-vae": "training.evaluation.cli",
    "export-onnx": "export.cli",
    "serve-vae": "serve.server.cli",
    "sample-cli": "serve.sample_cli",
}
SHARED = Path(__file__).parents[2] / "shared"
# Where a benchmark that is imported finds its siblings, as it does when it is run. The end: one is called triton.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

TOO_SLOW = 0.16  # seconds for a million additions: a machine of half the usual speed, where CI would take over an hour
ADDITIONS = """import statistics, timeit
print(statistics.median(timeit.repeat("for i in range(1_000_000): x += i", "x = 0", number=1, repeat=9)))"""
LEFT_OUT = "BALANCED_VAE_SLOW_TESTS_LEFT_OUT"  # the variable that tells a run's workers why
START = 180  # seconds that a server has until it is ready

Once = Callable[[str, Callable[[Path], object]], Path]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_configure() -> None:
    """Decide whether CI's machine is too slow for slow tests, before any worker starts that would slow it."""
    if "CI" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return
    # By all cores at once, as the tests are: two may be one that is shared.
    counting, cores = [sys.executable, "-c", ADDITIONS], len(os.sched_getaffinity(0))
    counters = [subprocess.Popen(counting, stdout=subprocess.PIPE, text=True) for _ in range(cores)]
    additions = max(float(counter.communicate()[0]) for counter in counters)
    if additions > TOO_SLOW:
        os.environ[LEFT_OUT] = (
            f"slow, and this machine is: {additions:.2f} s for a million additions, where .08 are usual"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no core waits for it at the end; leave it out where that is too slow."""
    long = ("tests/e2e/", "tests/training/")
    items.sort(key=lambda item: not item.nodeid.startswith(long))
    if LEFT_OUT in os.environ:
        left_out = pytest.mark.skip(reason=os.environ[LEFT_OUT])
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(left_out)


@pytest.fixture(scope="session", autouse=True)
def user_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def command(*words: object, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end, as a user would."""
    name, *rest = map(str, words)
    full = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run([BIN / name, *rest], capture_output=True, text=True, timeout=timeout, env=full)


def inside(*words: object) -> subprocess.CompletedProcess[str]:
    """Run one of our commands in this process, which spares the seconds that TensorFlow takes to load."""
    name, *rest = map(str, words)
    result = CliRunner().invoke(import_module(HOMES[name]).main, rest, prog_name=name)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess([name, *rest], result.exit_code, result.stdout, result.stderr)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


def assert_clear_error(result: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One line that says what is wrong; no traceback; the exit code of its kind."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert last_line(result).startswith("Error: "), result.stderr
    for word in words:
        assert word in last_line(result), result.stderr


def draw_faces(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Draw simple faces, each another one, as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        paper, skin, hair = (tuple(int(c) for c in rng.integers(60, 255, 3)) for _ in range(3))
        picture = Image.new("RGB", size, paper)
        pen = ImageDraw.Draw(picture)
        width, height = size
        pen.ellipse((6, 4, width - 6, height - 4), fill=hair)
        pen.ellipse((9, 10, width - 9, height - 6), fill=skin)
        for eye in (width // 3, 2 * width // 3):
            pen.ellipse((eye - 2, height // 2 - 4, eye + 2, height // 2), fill="black")
        pen.arc((14, height // 2, width - 14, height - 12), 20, 160, fill="red", width=2)
        picture.save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Have something made by the first worker of a test run that asks for it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def find(name: str, make: Callable[[Path], object]) -> Path:
        path, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path

    return find


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    return once("pictures", lambda folder: draw_faces(folder, 48))


@pytest.fixture(scope="session")
def smoke_run(pictures: Path, once: Once) -> Path:
    """A run directory that `train-vae` made."""

    def make(out: Path) -> None:
        result = command("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out)
        assert result.returncode == 0, result.stderr
        assert "0000 00:00:" not in result.stderr  # TensorFlow's own log

    return once("smoke", make)


@pytest.fixture(scope="session")
def smoke_bundle(smoke_run: Path, once: Once) -> Path:
    """A bundle that `export-onnx` made of it."""

    def make(out: Path) -> None:
        result = command("export-onnx", smoke_run, "--out", out)
        assert result.returncode == 0, result.stderr

    return once("smoke.onnx", make)


def free_address() -> str:
    """An address of the loopback where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def serving(
    *words: object, log: Path | None = None, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real server on a free port of the loopback, told to stop at the end; what it says goes to `log`."""
    with starting([BIN / "serve-vae", "--listen", "127.0.0.1:0", *words], log, **environment) as started:
        yield started


@contextmanager
def starting(
    words: Sequence[object], log: Path | None = None, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server, by the words that start it."""
    full = [str(word) for word in words]
    with ExitStack() as stack:
        path = log or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        with (
            path.open("wb") as said,
            path.open() as heard,
            subprocess.Popen(full, stderr=said, env={**os.environ, **environment}) as process,
        ):
            try:
                line, deadline = "", time.monotonic() + START
                while "ready, listening on" not in line:
                    ended = process.poll() is not None
                    line = heard.readline()
                    if ended and not line:
                        pytest.fail(path.read_text())
                    if time.monotonic() > deadline:
                        pytest.fail(f"not ready after {START} seconds:\n{path.read_text()}")
                    if not line:
                        select.select([], [], [], 0.02)  # a file cannot be waited for
                yield json.loads(line)["message"].split()[-1] if line.startswith("{") else line.split()[-1], process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(timeout=60)
                    except subprocess.TimeoutExpired:
                        process.kill()  # or the end of the block would wait for it again, and for ever
                        raise


def metrics(log: Path) -> str:
    """What a server that was started with `--metrics 127.0.0.1:0` shows to Prometheus."""
    (url,) = re.findall(r"metrics at (\S+)", log.read_text())
    with urllib.request.urlopen(url, timeout=20) as reply:
        return str(reply.read().decode())


@pytest.fixture(scope="session")
def server(smoke_bundle: Path) -> Iterator[str]:
    with serving("--model", smoke_bundle) as (address, _):
        yield address


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find data that only the project's own machines have; skip, visibly, elsewhere."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name}, which is not part of the repository")
        return SHARED / name

    return find
