"""Every benchmark runs, at a size that measures nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.bundle import DEFAULT
from tests.conftest import BIN

FOLDER = Path(__file__).parents[1] / "benchmarks"
LIBRARIES = {"faults", "ledger"}  # of soak.py


def bench(name: str, *words: object) -> str:
    """Run a benchmark to its end; return what it printed."""
    full = [BIN / "python", FOLDER / f"{name}.py", *map(str, words)]
    result = subprocess.run(full, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def rates(text: str) -> list[float]:
    """Return every figure of images a second."""
    return [float(each.replace(",", "")) for each in re.findall(r"([\d,.]+) images/s", text)]


def test_every_benchmark_is_tried_here() -> None:
    tried = set(re.findall(r'bench\("(\w+)"', Path(__file__).read_text()))
    assert tried == {path.stem for path in FOLDER.glob("*.py")} - LIBRARIES


@pytest.mark.slow
def test_exporter() -> None:
    said = bench("exporter", "--recipe", "smoke", "--batch", 4, "--device", "cpu", "--rounds", 1)
    for name in ("naive", "ours", "fp32, branches joined", "fp32, rows split", "int8"):
        assert f"{name} " in said
    assert len(rates(said)) == 5
    assert all(rates(said))


@pytest.mark.slow
def test_train() -> None:
    said = bench("train", "--recipe", "smoke", "--steps", 2, "--try", "batch=4")
    assert "batch=4 " in said
    assert all(rates(said))


@pytest.mark.slow
def test_balance(pictures: Path) -> None:
    few = ["--steps", 2, "--momentum", 0.9, "--seeds", 1, "--side", 16, "--base-dim", 4]
    assert re.search(r"\| 2 \| 0.9 \| \d", bench("balance", "--data", pictures, *few))


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    said = bench("growth", "--points", 1, "--plot", tmp_path / "growth.png")
    assert re.search(r"samples in a folder, png +[-\d.]+ +[-\d.]+   100: [\d.]+ s, \d+\n", said)
    assert Image.open(tmp_path / "growth.png").width == 1000


@pytest.mark.slow
def test_encode(smoke_bundle: Path) -> None:
    said = bench("encode", "--model", smoke_bundle, "--pictures", 2, "--count", 4, "--rounds", 1)
    for name in ("png, as it is", "webp, method 2, effort 80", "rows alone, zlib, runs only"):
        assert re.search(rf"^{name} +\d+ us +\d+$", said, re.MULTILINE)
    assert re.search(r"^png +[\d.]+ images/s, [\d.]+ of npy$", said, re.MULTILINE)
    assert all(rates(said))


@pytest.mark.slow
def test_second_stage() -> None:
    said = bench("second_stage", "--recipe", "smoke", "--steps", 2, "--rounds", 1, "--try", "second_dim=8")
    assert re.search(r"second_dim=8 +[\d,]+ latents/s", said)


def test_resize(tmp_path: Path) -> None:
    bench("resize", "--out", tmp_path / "resize.png")
    drawn, shown = (np.asarray(Image.open(each / "resize.png")) for each in (tmp_path, FOLDER.parent / "docs"))
    assert drawn.shape == shown.shape
    assert np.abs(drawn.astype(int) - shown).mean() < 1  # the titles' font may be another version's


@pytest.mark.slow
def test_sample(smoke_bundle: Path) -> None:
    said = bench("sample", "--model", smoke_bundle, "--count", 8, "--rounds", 1, "--batch", 4)
    assert len(rates(said)) == 2
    assert all(rates(said))


@pytest.mark.slow
def test_server(smoke_bundle: Path) -> None:
    few = ["--seconds", 0.1, "--rounds", 1, "--clients", 2, "--size", 16, "--stream", 64]
    said = bench("server", "--model", smoke_bundle, "--device", "cpu", *few)
    for name in ("engine in process, requests of 16", "serve-vae, 2 clients, requests of 16", "one stream of 64"):
        assert name in said
    for encoding in ("raw", "png"):
        assert f"the wire alone, {encoding}, 8 streams" in said


@pytest.mark.slow
def test_soak(smoke_bundle: Path) -> None:
    said = bench("soak", "--minutes", 0.05, "--model", smoke_bundle, "--workers", 2, "--killers", 1, "--stops", 1)
    assert "nothing is wrong" in said


def test_peers_ask_for_one() -> None:
    result = subprocess.run([BIN / "python", FOLDER / "peers.py"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "expected --triton, --litserve or both" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("litserve") is None, reason="needs litserve, which is not among the tests' packages")
def test_litserve() -> None:
    said = bench("peers", "--litserve", sys.executable, "--clients", 2, "--count", 2, "--seconds", 0.1)
    assert "at most 0 grey levels" in said


@pytest.mark.slow
def test_triton(shared: Callable[[str], Path]) -> None:
    folder = shared("pytriton/tritonserver")
    assert "at most 0 grey levels" in bench("triton", "--server", folder, "--model", DEFAULT, "--count", 8)
