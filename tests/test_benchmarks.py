"""Every benchmark runs, at a size that measures nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.bundle import DEFAULT
from tests.conftest import BIN

# Found by way of tests.conftest, as benchmarks find each other.
from growth import exponent  # isort: skip
from measure import Row, Table, interleave  # isort: skip

FOLDER = Path(__file__).parents[1] / "benchmarks"
DOCS = FOLDER.parent / "docs"
LIBRARIES = {"faults", "ledger", "measure", "networks", "runtimes"}  # of soak.py, and of those that measure
LIBRARIES |= {"protocols", "results_page", "verdicts"}  # of results.py, whose tests are in test_results.py


def bench(name: str, *words: object) -> str:
    """Run a benchmark to its end; return what it printed."""
    full = [BIN / "python", FOLDER / f"{name}.py", *map(str, words)]
    result = subprocess.run(full, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def figures(report: Path) -> dict[str, list[float]]:
    """Return what a benchmark wrote: the values of each row, by its name; each has one a round, above 0."""
    facts = json.loads(report.read_text())
    assert facts["machine"]["cores"]
    assert report.name in facts["command"]
    rows = {row["name"]: row["values"] for table in facts["tables"] for row in table["rows"]}
    assert all(value > 0 for values in rows.values() for value in values)
    return rows


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exporter.py left its models and what it measured."""
    folder = tmp_path_factory.mktemp("models")
    few = ["--recipe", "smoke", "--batch", 4, "--rounds", 1]
    bench("exporter", *few, "--keep", folder, "--json", folder / "report.json")
    return folder


def test_every_benchmark_is_tried_here() -> None:
    tried = set(re.findall(r'bench\("(\w+)"', Path(__file__).read_text()))
    assert tried == {path.stem for path in FOLDER.glob("*.py")} - LIBRARIES


SIZES = (1, 10, 100, 1000)


@pytest.mark.parametrize(
    ("values", "slope"),
    [
        ({size: 3.0 * size for size in SIZES}, 1),
        (dict.fromkeys(SIZES, 3.0), 0),
        ({size: 3.0 * size**2 for size in SIZES}, 2),
        ({size: max(100.0, size) for size in SIZES}, 1),  # what starting costs is no part of it
        ({1: 3.0, 10: 30.0}, 1),
        ({10: 3.0}, 0),
    ],
)
def test_an_exponent_is_the_slope_of_the_larger_sizes(values: dict[int, float], slope: float) -> None:
    assert exponent(values) == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize(("warm", "values"), [(True, [2.0, 3.0]), (False, [1.0, 2.0])])
def test_rounds_take_turns_and_a_warm_one_does_not_count(warm: bool, values: list[float]) -> None:
    turns: list[str] = []

    def measure(name: str) -> float:
        turns.append(name)
        return float(turns.count(name))

    found = interleave({name: partial(measure, name) for name in "ab"}, 2, warm=warm)
    assert found == {"a": values, "b": values}
    assert turns == ["a", "b"] * (2 + warm)


def test_a_ratio_is_the_median_of_those_within_rounds() -> None:
    """The medians' own ratio would be 0.40."""
    rows = [Row("ours", "s", [1, 30, 4]), Row("theirs", "s", [2, 10, 40]), Row("theirs", "MB", [7])]
    lines = str(Table("Speed", rows, ["theirs"])).splitlines()
    assert [line.split("|")[-2].strip() for line in lines if "-" not in line] == ["/ theirs", "0.50", "1.00", "1.00"]


@pytest.mark.slow
def test_exporter(models: Path) -> None:
    told = figures(models / "report.json")
    assert told.keys() >= {"tf2onnx, unchanged", "ours", "fp32", "fp32, branches joined", "fp32, rows split", "int8"}


@pytest.mark.slow
def test_sampling(models: Path, report: Path) -> None:
    few = ["--recipe", "smoke", "--batch", 4, "--rounds", 1, "--seconds", 0]
    said = bench("sampling", *few, "--keep", models, "--json", report)
    told = figures(report)
    openvino, onnxruntime = "tf2onnx's graph, OpenVINO, float32", "tf2onnx's graph, ONNX Runtime"
    for name in ("Keras predict", "tf.function", openvino, onnxruntime):
        assert name in told
    for precision in ("fp32", "int8"):
        assert {f"ours, {precision}, cpu, exact", f"ours, {precision}, openvino, exact"} <= told.keys()
    assert ("torch eager" in told) != ("left out: torch: " in said)


@pytest.mark.slow
def test_gpu(report: Path) -> None:
    few = ["--device", "cpu", "--batch", 4, "--rounds", 1, "--seconds", 0, "--runtime", "ours"]
    said = bench("gpu", *few, "--json", report)
    assert {"ours, fp32, exact", "ours, int8, exact"} <= figures(report).keys()
    assert "left out: ours, fp32, exact, CUDA graphs: CUDA graphs need a cuda device" in said


@pytest.mark.slow
def test_train(report: Path) -> None:
    few = ["--recipe", "smoke", "--steps", 2, "--rounds", 1, "--try", "batch=4", "--backend", "tensorflow"]
    said = bench("train", *few, "--json", report)
    assert "recipe smoke, batch=4" in said
    assert {"ours, tensorflow, float32", "the pipeline alone"} <= figures(report).keys()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch, which is not among the tests' packages")
def test_train_beside_a_loop_for_torch(report: Path) -> None:
    few = ["--recipe", "smoke", "--steps", 2, "--rounds", 1, "--try", "batch=4", "--backend", "torch"]
    bench("train", *few, "--json", report)
    assert {"ours, torch, float32", "a loop for torch, float32"} <= figures(report).keys()


@pytest.mark.slow
def test_balance(pictures: Path) -> None:
    few = ["--steps", 2, "--momentum", 0.9, "--seeds", 1, "--side", 16, "--base-dim", 4]
    assert re.search(r"\| 2 \| 0.9 \| \d", bench("balance", "--data", pictures, *few))


@pytest.mark.slow
def test_growth(tmp_path: Path, report: Path) -> None:
    said = bench("growth", "--points", 1, "--plot", tmp_path / "growth.png", "--json", report)
    for title in ("Samples in a folder, png", "Pixels in a picture", "Clients of a server"):
        assert f"{title}: exponent 0.00 in time" in said
    assert {"100", "1", "1,024", "1,000"} == figures(report).keys()
    assert Image.open(tmp_path / "growth.png").width == 1000


@pytest.mark.slow
def test_encode(smoke_bundle: Path, report: Path) -> None:
    bench("encode", "--model", smoke_bundle, "--pictures", 2, "--count", 4, "--rounds", 1, "--json", report)
    told = {name.partition(":")[0] for name in figures(report)}
    assert {
        "png, as it is",
        "webp, method 2, effort 80",
        "rows alone, zlib, runs only",
        "png",
        "npy",
        "parquet",
    } <= told


@pytest.mark.slow
def test_start(report: Path) -> None:
    bench("start", "--rounds", 1, "--device", "cpu", "--json", report)
    assert {"sample-cli --n 1, fp32, cpu", "sample-cli --n 1, int8, cpu", "serve-vae, cpu"} <= figures(report).keys()


@pytest.mark.slow
def test_second_stage(report: Path) -> None:
    few = ["--recipe", "smoke", "--steps", 2, "--rounds", 1]
    assert "second_dim=8" in bench("second_stage", *few, "--try", "second_dim=8", "--json", report)
    assert figures(report).keys() == {"training steps", "their matrix products alone"}


def test_resize(tmp_path: Path) -> None:
    bench("resize", "--out", tmp_path / "resize.png")
    drawn, shown = (np.asarray(Image.open(each / "resize.png")) for each in (tmp_path, DOCS))
    assert drawn.shape == shown.shape
    assert np.abs(drawn.astype(int) - shown).mean() < 1  # the titles' font may be another version's


@pytest.mark.slow
def test_sample(smoke_bundle: Path, report: Path) -> None:
    few = ["--count", 8, "--rounds", 2, "--batch", 4, "--device", "cpu"]
    said = bench("sample", "--model", smoke_bundle, *few, "--json", report)
    told = figures(report)
    assert told.keys() == {"in process, cpu, batches of 4", "through the server, one stream"}
    for name, values in told.items():
        assert len(values) == 2
        assert name in said


@pytest.mark.slow
def test_server(smoke_bundle: Path, report: Path) -> None:
    few = ["--seconds", 0.1, "--rounds", 1, "--clients", 2, "--size", 16, "--stream", 64]
    said = bench("server", "--model", smoke_bundle, "--device", "cpu", *few, "--json", report)
    for title in ("requests of 16", "latency at half load", "one stream of 64", "the wire alone"):
        assert title in said
    for name in ("engine in process", "serve-vae, 2 clients", "p99", "raw, 8 streams", "png, 8 streams"):
        assert name in figures(report)


@pytest.mark.slow
def test_doors(smoke_bundle: Path, report: Path) -> None:
    few = ["--seconds", 0.1, "--rounds", 1, "--clients", 2]
    said = bench("doors", "--model", smoke_bundle, "--device", "cpu", *few, "--json", report)
    for title in ("one picture a request, 2 clients", "an engine that costs nothing", "64 pictures as a grid"):
        assert title in said
    for name in ("gRPC, pixels", "gRPC, PNG", "HTTP, PNG", "the file"):
        assert name in figures(report)


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    assert list((DOCS / "benchmarks").glob("*.json")), "make bench writes some"
    shutil.copytree(DOCS / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(DOCS.parent / "README.md", tmp_path)
    shutil.copy(DOCS / "scale.md", tmp_path)
    bench("render", "--docs", tmp_path, "--readme", tmp_path / "README.md")
    for here, there in (("benchmarks.md", DOCS), ("scale.md", DOCS), ("README.md", DOCS.parent)):
        assert (tmp_path / here).read_text() == (there / here).read_text(), "make bench renews it"


def test_readmes_table_says_what_was_not_measured(tmp_path: Path) -> None:
    """A machine without torch measures as well."""
    shutil.copytree(DOCS / "benchmarks", tmp_path / "benchmarks")
    shutil.copy(DOCS.parent / "README.md", tmp_path)
    shutil.copy(DOCS / "scale.md", tmp_path)
    for path in (tmp_path / "benchmarks").glob("*.json"):
        facts = json.loads(path.read_text())
        for table in facts["tables"]:
            table["rows"] = [row for row in table["rows"] if "torch" not in row["name"]]
        path.write_text(json.dumps(facts))
    bench("render", "--docs", tmp_path, "--readme", tmp_path / "README.md")
    assert "not measured" in (tmp_path / "README.md").read_text()


def test_results(tmp_path: Path) -> None:
    bench("results", "render", "--docs", tmp_path)
    assert "none was run here" in (tmp_path / "results.md").read_text()


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
    assert "at most 0 grey levels" in bench("repository", "--server", folder, "--model", DEFAULT, "--count", 8)


@pytest.mark.slow
def test_cluster(smoke_bundle: Path, report: Path) -> None:
    few = ["--model", smoke_bundle, "--count", 100, "--workers", 1, "--shard", 50, "--rounds", 1]
    bench("cluster", *few, "--json", report)
    assert figures(report).keys() == {"one process, threads: 1", "Ray, workers: 1"}
