"""What benchmarks/results.py runs, how it decides claims, and the page that it makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import BIN
from tests.training.conftest import FEATURES, FLAT, images, layers, save
from training.recipes import RECIPES

# Found by way of tests.conftest, as benchmarks find each other.
import protocols  # isort: skip
import results  # isort: skip
import verdicts  # isort: skip
from verdicts import FAILS, HOLDS, OPEN  # isort: skip

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PLAN = protocols.plan(protocols.TOML)
DISTANCES = st.floats(1, 500)


def ran(mse: float = 0.01, inactive: int = 5, lr: float = 1e-4, **distances: float | None) -> dict[str, Any]:
    """A made-up run; `GEN_2` is the distance of GEN-2, `GEN_2_scalar` that with scalar normalisation."""
    records = []
    for name, value in distances.items():
        kind, _, mode = name.replace("_", "-", 1).partition("_")
        records.append({"set": kind, "normalisation": mode or "none", "value": value, "kid": 0.01, "count": 5000})
    return {"records": records, "latents": {"mse": mse, "inactive": inactive}, "recipe": {"lr": lr}}


def generated(*values: float) -> list[dict[str, Any]]:
    return [ran(GEN_2=value) for value in values]


OURS = (["computed", "GEN-2"], ["learned", "GEN-2"])


@pytest.mark.parametrize(
    ("computed", "learned", "answer"),
    [
        ([70, 71, 72], [80, 81, 82], HOLDS),
        ([80, 81, 82], [70, 71, 72], FAILS),
        ([70, 75, 80], [72, 77, 82], OPEN),  # 2 apart, with deviations of 5
        ([70, 71, 72], [80], HOLDS),  # one seed has the other row's deviation
        ([70], [80], OPEN),  # nobody knows how far they vary
        ([70, 71], [], OPEN),
        ([], [], OPEN),
    ],
)
def test_a_lower_mean_decides_beyond_the_deviations(computed: list[float], learned: list[float], answer: str) -> None:
    runs = {"computed": generated(*computed), "learned": generated(*learned)}
    verdict = verdicts.lower(runs, *OURS)
    assert verdict.answer == answer
    assert ("computed" in verdict.because) == (not computed)


@given(st.lists(DISTANCES, min_size=2, max_size=4), st.lists(DISTANCES, min_size=2, max_size=4))
def test_sides_that_change_places_change_the_verdict(one: list[float], other: list[float]) -> None:
    there = verdicts.lower({"computed": generated(*one), "learned": generated(*other)}, *OURS).answer
    back = verdicts.lower({"computed": generated(*other), "learned": generated(*one)}, *OURS).answer
    assert back == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[there]


@pytest.mark.parametrize(
    ("pairs", "answer"),
    [
        ([(70, 80), (75, 76)], HOLDS),
        ([(80, 70), (76, 75)], FAILS),
        ([(70, 80), (76, 75)], OPEN),
        ([(70, 80)], OPEN),
        ([(70, 80), (None, 80)], OPEN),  # too few pictures for a distance
        ([], OPEN),
    ],
)
def test_every_run_decides(pairs: list[tuple[float | None, float]], answer: str) -> None:
    runs = {"computed": [ran(GEN_2=ours, GEN_1=theirs) for ours, theirs in pairs]}
    assert verdicts.paired(runs, ["computed", "learned"], "GEN-2", "GEN-1").answer == answer


def test_normalised_samples_are_another_set() -> None:
    run = ran(GEN_2=70, GEN_2_scalar=65)
    assert verdicts.figure(run, "GEN-2") == 70
    assert verdicts.figure(run, "GEN-2, scalar") == 65
    assert verdicts.figure(run, "GMM") is None


def test_what_was_measured_along_training_is_no_result() -> None:
    run = ran(GEN_1=70)
    run["records"].insert(0, {"set": "GEN-1", "normalisation": "none", "value": 99, "epoch": 4})
    assert verdicts.figure(run, "GEN-1") == 70


def by_rate(*facts: tuple[float, float, int]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Rows of (mse, GEN-2's distance, inactive latents), from the lowest rate to the highest, and their names."""
    runs = {f"lr-{at}": [ran(mse, idle, at + 1, GEN_2=far)] for at, (mse, far, idle) in enumerate(facts)}
    return runs, list(runs)


PAPER = [(0.0047, 75.8, 19), (0.0041, 68.8, 17), (0.0040, 71.8, 15), (0.0039, 74.5, 13)]  # table 5


def test_the_papers_own_table_5_has_the_papers_verdicts() -> None:
    runs, rows = by_rate(*PAPER)
    order = verdicts.unordered(runs, rows, "GEN-2", 0.5, 0.9)
    assert order.answer == HOLDS
    assert order.because.startswith("+0.20 over 4 rows")
    fewer = verdicts.falling(runs, rows[::-1])  # the rate decides the order, not who names them
    assert (fewer.answer, fewer.because) == (HOLDS, "19 at 1, 17 at 2, 15 at 3, 13 at 4")


@pytest.mark.parametrize(
    ("distances", "answer"),
    [
        ([1, 2, 3, 4, 5], FAILS),
        ([5, 4, 3, 2, 1], HOLDS),
        ([2, 1, 4, 3, 5], OPEN),
        ([1, 1, 1, 1, 1], OPEN),
        ([1, 2, 3], OPEN),
    ],
)
def test_the_order_of_errors_and_distances(distances: list[int], answer: str) -> None:
    runs, rows = by_rate(*((at / 100, far, 0) for at, far in enumerate(distances, 1)))
    assert verdicts.unordered(runs, rows, "GEN-2", 0.5, 0.9).answer == answer


@given(st.lists(st.integers(0, 64), min_size=0, max_size=5))
def test_inactive_latents_over_the_rates(counts: list[int]) -> None:
    runs, rows = by_rate(*((0.01, 70, count) for count in counts))
    answer = verdicts.falling(runs, rows).answer
    if len(counts) < 3:
        assert answer == OPEN
    elif counts[-1] > counts[0]:
        assert answer == FAILS
    else:
        fall = counts == sorted(counts, reverse=True) and counts[-1] < counts[0]
        assert answer == (HOLDS if fall else OPEN)


def test_every_row_can_be_run() -> None:
    for row in PLAN.rows:
        assert row.resolved.seed == row.seed
        assert row.recipe in RECIPES
        assert "second-stage" in row.resolved.priors
    shared = {row.protocol.name: [] for row in PLAN.rows}
    for row in PLAN.rows:
        recipe = row.resolved
        shared[row.protocol.name].append(
            (recipe.epochs, recipe.halve_every, recipe.batch, recipe.base_dim, recipe.limit)
        )
    assert {name: len(set(each)) for name, each in shared.items()} == dict.fromkeys(shared, 1)


def test_the_rates_of_table_5_are_relative() -> None:
    for protocol in ("cifar10-short", "cifar10-small"):
        rates = {row.name: row.resolved.lr for row in PLAN.rows if row.protocol.name == protocol}
        for name, times in (("lr-20", 2), ("lr-15", 1.5), ("lr-05", 0.5)):
            assert rates[name] == pytest.approx(times * rates["computed"])


def test_every_claim_names_rows_and_a_rule() -> None:
    for claim in PLAN.claims:
        for name in claim.protocols:
            rows = {row.name for row in PLAN.rows if row.protocol.name == name}
            given = claim.given
            assert set(given.get("rows") or [given[side][0] for side in ("ours", "theirs")]) <= rows
        assert verdicts.RULES[claim.by]({}, **claim.given).answer == OPEN


def test_the_papers_figures_are_those_of_its_own_rows() -> None:
    scores = {row.key: row.scores for row in PLAN.rows}
    assert scores["cifar10-short-computed-1"] == "53.8 / 80.2 / 68.8, 17 inactive"
    assert scores["cifar10-short-lr-20-0"] == "53.0 / 80.6 / 74.5, 13 inactive, mse .0039"
    assert scores["cifar10-short-learned-0"] == "- / 76.7 / 72.9"
    assert scores["cifar10-short-rae-l2-0"] == "32.24 / 80.80 / 74.16"
    assert scores["cifar10-short-annealed-0"] == scores["celeba64-computed-k1-0"] == ""


def told(*words: object, code: int) -> str:
    result = CliRunner().invoke(results.main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('"batch2=500"', '"batches2=500"', ["cifar10-short-computed-0", "did you mean batch2?"]),
        ('name = "learned"', 'name = "computed"', ["Received twice: celeba64-computed-0"]),
        ('split = "test"', 'part = "test"', ["a protocol takes", "part, split"]),
        ("snapshots = true", "snapshot = true", ["a row takes", "snapshot"]),
        ('protocols = ["celeba64"]', 'protocols = ["celeba65"]', ["names no protocol", "celeba65"]),
        ("seed = 0", "seed = ", ["cannot read"]),
    ],
)
def test_a_wrong_file_is_refused(before: str, after: str, words: list[str], tmp_path: Path) -> None:
    wrong = tmp_path / "rows.toml"
    wrong.write_text(protocols.TOML.read_text().replace(before, after))
    said = told("render", "--docs", tmp_path, "--rows", wrong, code=1)
    for word in words:
        assert word in said
    assert not (tmp_path / "results.md").exists()


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    features = tmp_path / "another.onnx"
    features.touch()
    assert "Received: nobody" in told("run", "--data", tmp_path, "--only", "nobody", code=2)
    said = told("run", "--data", tmp_path, "--features", features, code=2)
    assert "--features takes efficientnet-lite0.onnx" in said


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    """And nothing else: whoever changes one of them renders the page again."""
    if (DOCS / "results").exists():
        shutil.copytree(DOCS / "results", tmp_path / "results")
    told("render", "--docs", tmp_path, code=0)
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text(), "results.py render renews it"


def kept(row: protocols.Row, **more: float) -> dict[str, Any]:
    """What `run` would keep of a row, with made-up figures."""
    cards = {"extractor": {"name": row.protocol.extractor, "digest": "e" * 64}}
    cards["reference"] = {"split": row.protocol.split, "count": 5000, "of": 10000, "data": "d" * 64}
    part = {"seconds": 90, "backend": "jax", "device": "a GPU"}
    point = {"epoch": 12, "mse": 0.02, "gamma": 0.14, "active": 60}
    return {
        **ran(GEN_1=91, **{"GEN_2": 80, "GEN_2_scalar": 75, **more}),
        "recipe": row.resolved.to_dict(),
        "evaluation": {"metric": "FD (efficientnet-lite0)", **cards},
        "stages": [{"steps": 6000, "images": 600000}, {"steps": 3000, "images": 1500000}],
        "train": part,
        "evaluate": part,
        "final": point,
        "history": [{**point, "epoch": 1}, point],
    }


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., None]:
    (tmp_path / "results").mkdir()

    def keep(key: str, **more: float) -> None:
        row = next(row for row in PLAN.rows if row.key == key)
        (tmp_path / "results" / f"{key}.json").write_text(json.dumps(kept(row, **more)))

    return keep


def test_a_page_of_some_rows(stored: Callable[..., None], tmp_path: Path) -> None:
    for seed, far in enumerate((78, 80, 82)):
        stored(f"cifar10-short-computed-{seed}", GEN_2=far)
        stored(f"cifar10-short-learned-{seed}", GEN_2=far + 10)
    told("render", "--docs", tmp_path, code=0)
    page = (tmp_path / "results.md").read_text()
    assert "Of 40 rows, 6 were run here" in page
    numbers = "80 ± 2 (3 seeds) against 90 ± 2 (3 seeds): -10, where more than 4 decides"
    assert f"(tables 1 and 4) | cifar10-short | **holds** | {numbers} |" in page
    assert "(tables 1 and 5) | cifar10-short | **not decided here** | below in 5 of 6 runs" in page  # 92 is above 91
    assert "| computed | 3 | 91 ± 0 | 80 ± 2 | 75 ± 0 |" in page
    assert "600,000 pictures seen; steps of the stages: 6,000 and 3,000. Trained on a GPU (jax) in 1.5 minutes" in page
    missing = "lr-20-0, lr-15-0, lr-05-0, fixed-0, annealed-0, rae-l2-0, rae-sn-0, ae-0"
    assert f"Not run here: {missing}. All of them, or one by `--only cifar10-short-lr-20-0`:" in page
    assert "    KERAS_BACKEND=jax python benchmarks/results.py run --data data/" in page
    for name in ("distances", "balance"):
        assert f"(results/cifar10-short-along-{name}.png)" in page
        assert (tmp_path / "results" / f"cifar10-short-along-{name}.png").stat().st_size < 60_000


def test_files_of_other_settings_are_refused(stored: Callable[..., None], tmp_path: Path) -> None:
    key = "cifar10-short-computed-0"
    stored(key)
    file = tmp_path / "results" / f"{key}.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"recipe": {**run["recipe"], "epochs": 13}}))
    assert "made with other settings" in told("render", "--docs", tmp_path, code=1)
    stored(key)
    stored("cifar10-short-learned-0")
    evaluation = run["evaluation"]
    evaluation["extractor"]["digest"] = "f" * 64
    file.write_text(json.dumps(run))
    assert "measured in different ways" in told("render", "--docs", tmp_path, code=1)
    file.rename(tmp_path / "results" / "stranger.json")
    assert "of no row of the plan" in told("render", "--docs", tmp_path, code=1)


def test_a_history_is_thinned_evenly() -> None:
    for count in (1, 2, 40, 41, 700):
        records = [{"epoch": epoch} for epoch in range(1, count + 1)]
        thin = [each["epoch"] for each in results.thinned(records)]
        assert len(thin) <= results.POINTS + 1
        assert (thin[0], thin[-1]) == (1, count)
        assert thin == sorted(set(thin))


CHILD = "import os, signal; signal.signal(15, lambda *_: os._exit(143)); os.kill(os.getppid(), 15); signal.pause()"
PARENT = f"""
import results
results.SCRIPTS["train_vae"] = {CHILD!r}
commands = results.Commands()
for _ in range(2):
    try:
        commands.run("train_vae", [])
    except results.Stopped:
        print("stopped by", commands.signal)
"""


def test_a_signal_is_passed_on_and_nothing_is_begun_after_it() -> None:
    """The first command ends by the signal that it has us sent; the second would send another, and is not started."""
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    words = [BIN / "python", "-c", PARENT]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, **paths})
    assert (result.returncode, result.stdout) == (0, "stopped by 15\nstopped by 15\n"), result.stderr


SMOKE = """
rows = [
    { protocol = "tiny", name = "computed", recipe = "smoke", seed = 0 },
    { protocol = "tiny", name = "learned", recipe = "smoke", seed = 0, settings = ["balance=learned"] },
]

[protocols.tiny]
data = "pictures"
settings = []
count = 48
split = "train"
extractor = "tiny"
where = "any machine"
departs = "Nothing is as in the paper."

[[claims]]
says = "A computed gamma is better"
rule = "the means"
by = "lower"
protocols = ["tiny"]
given = { ours = ["computed", "GEN-2"], theirs = ["learned", "GEN-2"] }
"""


@pytest.mark.slow
def test_a_row_is_run_stopped_gone_on_with_and_rendered(pictures: Path, smoke_run: Path, tmp_path: Path) -> None:
    """By the commands; the run that they go on with is one that another test's `train-vae` has finished."""
    (tmp_path / "rows.toml").write_text(SMOKE)
    features = save(tmp_path / "tiny.onnx", layers(FLAT), images(), FEATURES)
    docs, work = tmp_path / "docs", tmp_path / "work"
    shutil.copytree(smoke_run, work / "tiny-computed-0")
    places = ["--data", pictures.parent, "--features", features, "--docs", docs, "--work", work]
    run = [BIN / "python", ROOT / "benchmarks" / "results.py", "run", *places, "--rows", tmp_path / "rows.toml"]
    words = [str(word) for word in [*run, "--only", "tiny-computed-0"]]

    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("tiny-computed-0: train-vae --recipe smoke")
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "stopped in tiny-computed-0; the same command goes on from here"
    assert not (docs / "results").exists()
    begun = json.loads((work / "tiny-computed-0.progress.json").read_text())["train_vae"]
    assert not begun["done"]

    result = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (file,) = (docs / "results").glob("*.json")
    what = json.loads(file.read_text())
    assert what["train"]["seconds"] > begun["seconds"]
    assert what["commands"] == [
        "train-vae --recipe smoke --data pictures --out runs/tiny-computed-0 --set seed=0",
        "evaluate-vae runs/tiny-computed-0 --data pictures --features tiny.onnx --count 48 --split train",
    ]
    assert str(tmp_path) not in file.read_text()
    assert what["stages"] == [{"steps": 6, "images": 96}, {"steps": 6, "images": 96}]
    assert {"mse", "kl", "gamma", "active", "latents", "variance_law"} <= what["final"].keys()
    assert [each["epoch"] for each in what["history"]] == [1, 2]
    labels = {verdicts.label(each) for each in what["records"]}
    assert labels == {"REC", "GEN-1", "GEN-2", "GEN-2, scalar", "GEN-2, per-dimension"}
    for each in what["records"]:
        assert np.isfinite([each[key] for key in ("value", "kid", "precision", "recall")]).all()

    over = subprocess.run([*map(str, run), "--budget", "0"], capture_output=True, text=True, timeout=60)
    assert (over.returncode, over.stderr) == (0, "0 minutes are over; the same command goes on with tiny-learned-0\n")
    told("render", "--docs", docs, "--rows", tmp_path / "rows.toml", code=0)
    page = (docs / "results.md").read_text()
    assert "| 1. A computed gamma is better | tiny | **not decided here** | learned was not run |" in page
    assert "| FD (tiny) | seeds | REC | GEN-1 | GEN-2 | GEN-2, scalar | GEN-2, per-dimension | mse | inactive |" in page
    assert "Not run here: learned-0. All of them, or one by `--only tiny-learned-0`:" in page
