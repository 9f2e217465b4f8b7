"""evaluate-vae: its records, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from serve.bundle import CARD_KEY
from tests.conftest import assert_clear_error, command, draw_faces, inside
from training.errors import RunError
from training.evaluation import evaluator
from training.evaluation.cli import main
from training.evaluation.compare import read
from training.evaluation.measure import keep
from training.model.normalise import MODES
from training.record.run import Run


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def assert_refused(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run, with its first stage as a snapshot of its first epoch."""
    copy = tmp_path_factory.mktemp("evaluated") / "smoke"
    shutil.copytree(smoke_run, copy)
    (copy / "snapshots").mkdir(exist_ok=True)
    shutil.copy(copy / "stage1.keras", copy / "snapshots" / "stage1-0001.keras")
    return copy


@pytest.fixture(scope="module")
def words(pictures: Path, extractor_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    cache = tmp_path_factory.mktemp("cache")
    return ["--data", pictures, "--features", extractor_file, "--count", 48, "--cache", cache]


def test_a_run_from_the_shell(run: Path, words: list[object], tmp_path: Path) -> None:
    result = command("evaluate-vae", run, *words, "--batch", 20, "--snapshots", "--markdown", tmp_path / "t.md")
    assert result.returncode == 0, result.stderr
    # Without a terminal each set has a line when it is done, beside those that are said as time goes by.
    progress = [line for line in result.stderr.splitlines() if line.endswith("ETA 0.0 min")]
    labels = ["REC", "GEN-1 normal none", *(f"GEN-2 second-stage {mode}" for mode in MODES)]
    labels += ["REC 1", "GEN-1 normal none 1"]
    said = [line.split("/48")[0] for line in progress if not line.startswith("reference: ")]  # that one may be cached
    assert said == [f"{label}: 48" for label in labels]
    assert "leave out pictures" not in result.stderr
    records = json.loads((run / "metrics.json").read_text())
    sets = [(each["set"], each.get("normalisation"), each.get("epoch")) for each in records if "value" in each]
    assert sets == [
        ("REC", None, None),
        ("GEN-1", "none", None),
        ("GEN-2", "none", None),
        ("GEN-2", "scalar", None),
        ("GEN-2", "per-dimension", None),
        ("REC", None, 1),
        ("GEN-1", "none", 1),
    ]
    for record in records:
        if "value" in record:
            assert record["metric"] == "FD (tiny)"
            assert record["count"] == 48
            assert record["value"] > 0
            assert 0 <= record["precision"] <= 1
            assert record["extractor"]["features"] == 8
            assert len(record["extractor"]["digest"]) == 64
            assert record["reference"]["split"] == "train"
            assert (record["reference"]["count"], record["reference"]["of"]) == (48, 48)
            assert "16x16x3" in record["reference"]["read"]
    # A snapshot that is the finished first stage measures as that does.
    values = {(each["set"], each.get("epoch")): each["value"] for each in records if "value" in each}
    assert values["REC", 1] == pytest.approx(values["REC", None], rel=1e-5)
    (latents,) = (each for each in records if each["metric"] == "latents")
    assert len(latents["per_latent"]) == 8
    assert latents["inactive"] == sum(not each["active"] for each in latents["per_latent"])
    assert Image.open(run / "figures" / "figure2.png").size[0] > 500
    table = (tmp_path / "t.md").read_text()
    assert "| GEN-2 " in result.stdout
    assert result.stdout.splitlines()[2] in table
    assert table.count("\n| ") > result.stdout.count("\n| ") + 8  # each latent has a row
    for text in ("Inactive: ", "Variance law: ", "sha256 ", "48 of 48 train pictures", "Seed 0"):
        assert text in result.stdout


def test_measuring_again_replaces_what_is_the_same_measurement(run: Path, words: list[object]) -> None:
    def measured() -> list[dict[str, Any]]:
        return json.loads((run / "metrics.json").read_text())

    short = ["--prior", "normal", "--no-kid", "--no-precision-recall"]
    assert evaluate(run, *words, *short).exit_code == 0
    before = measured()
    assert evaluate(run, *words, *short).exit_code == 0
    assert len(measured()) == len(before)
    assert "kid" not in measured()[-1]
    assert evaluate(run, *words, *short, "--seed", 1).exit_code == 0
    values = [each["value"] for each in measured() if each.get("set") == "GEN-1" and "epoch" not in each]
    assert len(values) == 2
    assert values[0] != values[1]


def test_latent_noise_is_another_measurement(run: Path, words: list[object], tmp_path: Path) -> None:
    out = tmp_path / "noise.json"
    scalar = ["--prior", "second-stage", "--normalise", "scalar", "--no-precision-recall"]
    assert evaluate(run, *words, *scalar).exit_code == 0
    assert evaluate(run, *words, *scalar, "--latent-noise", "--json", out).exit_code == 0
    record = read(out).records[-1]
    stages = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert record["latent_noise"] == stages[-1]["gamma"]
    plain = next(
        each
        for each in json.loads((run / "metrics.json").read_text())
        if each.get("normalisation") == "scalar" and "latent_noise" not in each
    )
    assert plain["value"] != record["value"]


def test_a_bundle_measures_as_its_run(run: Path, smoke_bundle: Path, words: list[object], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "run.json", tmp_path / "bundle.json"
    picked = ["--prior", "second-stage", "--normalise", "scalar"]
    assert evaluate(run, *words, *picked, "--json", ours).exit_code == 0
    result = evaluate(smoke_bundle, *words, "--json", theirs)
    assert result.exit_code == 0, result.output
    assert "no encoder" in result.stderr
    one, two = read(ours).records[-1], read(theirs).records[-1]
    assert (two["set"], two["prior"], two["normalisation"]) == ("GEN-2", "second-stage", "scalar")
    assert two["reference"] == one["reference"]
    assert two["value"] == pytest.approx(one["value"], rel=1e-2)
    both = evaluate("compare", ours, theirs)
    assert both.exit_code == 0, both.output
    assert "GEN-2, scalar" in both.stdout
    rows = [line.split("|")[1].strip() for line in both.stdout.splitlines() if line.startswith("| smoke")]
    assert rows[:2] == ["smoke", "smoke.onnx"]  # a run and its bundle have the same name, but not here


def test_what_the_runs_settings_leave_out_is_told(
    run: Path, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, half = tmp_path / "few", tmp_path / "half"
    for copy, changes in ((few, {"limit": 8}), (half, {"limit": 40, "validation": 0.5})):
        shutil.copytree(run, copy)
        config = json.loads((copy / "config.json").read_text())
        config["recipe"] |= changes
        (copy / "config.json").write_text(json.dumps(config))
    short = ["--prior", "normal", "--no-precision-recall"]
    result = evaluate(few, *words, *short, "--no-kid")
    assert_refused(result, "takes 9", "Received: 8; measure against another --split (limit=8 takes the first 8 of")
    assert "bring more pictures" not in result.stderr
    assert "leave out pictures here too: limit=8 takes the first 8 of train\n" in result.stderr
    monkeypatch.setattr(evaluator, "EVERY", 0.0)
    result = evaluate(half, *words, *short, "--split", "validation", "--batch", 10)
    assert result.exit_code == 0, result.output
    assert "limit=40 takes the first 40 of train, validation=0.5 moves that share of them from tr" in result.stderr
    for done in (10, 20, 30, 40, 48):
        assert f"GEN-1 normal none: {done}/48" in result.stderr


@pytest.fixture(scope="module")
def half(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that held some of its pictures back, and saw the mirror images of the others."""
    out = tmp_path_factory.mktemp("half") / "half"
    held_back = ("--set", "validation=0.4", "--set", "flip=true")
    result = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, *held_back)
    assert result.returncode == 0, result.stderr
    return out


def test_copying_is_measured_where_pictures_were_held_back(half: Path, words: list[object], tmp_path: Path) -> None:
    """Of a run, and of its bundle, which is measured against the same pictures."""
    bundle, sheets = tmp_path / "half.onnx", tmp_path / "sheets"
    assert inside("export-onnx", half, "--out", bundle).returncode == 0
    picked = ["--prior", "second-stage", "--normalise", "scalar"]
    records = []
    for subject, options in ((half, picked), (bundle, [])):
        result = evaluate(subject, *words, *options, "--json", tmp_path / "x.json", "--copies", sheets)
        assert result.exit_code == 0, result.output
        assert "| copying" in result.stdout
        records.append(read(tmp_path / "x.json").records[-1])
        unseen = records[-1]["unseen"]
        assert f"than a validation picture is, of {unseen['count']}: .5 for new ones, 1 for copies" in result.stdout
        assert unseen["count"] == 48 - records[-1]["reference"]["of"]
    one, two = records
    assert (one["reference"], one["unseen"]) == (two["reference"], two["unseen"])
    for key in ("copying", "copying_pixels"):
        assert 0 <= one[key] <= 1
        assert 0 < one[f"{key}_deviation"] < 0.2
        assert two[key] == pytest.approx(one[key], abs=0.02)
    assert sorted(path.name for path in sheets.iterdir()) == ["GEN-2-second-stage-scalar.png", "REC.png"]
    beside = evaluate("compare", tmp_path / "x.json", tmp_path / "x.json")
    assert "Copying (tiny)" in beside.stdout, beside.output
    assert "Copying (pixels)" in beside.stdout


def test_where_copying_cannot_be_measured_it_says_why(
    run: Path, half: Path, words: list[object], extractor_file: Path, tmp_path: Path
) -> None:
    other = draw_faces(tmp_path / "other", 60, (48, 48))
    elsewhere = ["--data", other, "--features", extractor_file, "--count", 48, "--cache", tmp_path]
    short = ["--prior", "normal", "--no-kid", "--no-precision-recall"]
    cases = (
        (run, words, "it takes 10 or more pictures that were held back from training; train-vae --set validation=0.1"),
        (half, [*words, "--split", "validation"], "it compares with the pictures of training, --split train"),
        (half, elsewhere, "--data holds other pictures than training saw"),
    )
    for subject, how, why in cases:
        result = evaluate(subject, *how, *short)
        assert result.exit_code == 0, result.output
        assert f"copying is not measured: {why}" in result.stderr
        assert_refused(evaluate(subject, *how, *short, "--copying"), "copying cannot be measured", why)
        if subject == half:
            assert_refused(evaluate(subject, *how, *short, "--copies", tmp_path / "x"), "--copies cannot draw", why)
    result = evaluate(half, *words, *short, "--no-copying", "--json", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    assert "copying is not measured" not in result.stderr
    assert "copying" not in read(tmp_path / "x.json").records[-1]
    result = evaluate(half, *words, *short, "--count", 20)  # later options win
    assert "copies are sought of 20 of " in result.stderr


def test_a_bundle_of_another_maker_with_a_strange_recipe(
    smoke_bundle: Path, words: list[object], tmp_path: Path
) -> None:
    """A card's recipe is any object; what is read of it to read pictures has to be of the right type."""
    model, other = onnx.load(smoke_bundle), tmp_path / "other.onnx"
    card = next(each for each in model.metadata_props if each.key == CARD_KEY)
    values = json.loads(card.value)
    card.value = json.dumps({**values, "recipe": {**values["recipe"], "crop": None}})
    onnx.save(model, other)
    assert_refused(evaluate(other, *words), "crop takes whole numbers a,b,c,d. Received: None")


def test_fid_is_what_the_inception_graph_gives(
    smoke_bundle: Path, inception_file: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fid.json"
    words = ["--data", pictures, "--inception", inception_file, "--cache", tmp_path, "--count", 40, "--json", out]
    result = evaluate(smoke_bundle, *words)
    assert result.exit_code == 0, result.output
    (record,) = read(out).records
    assert record["metric"] == "FID"
    assert record["value"] > 0
    assert record["extractor"]["name"] == "classify_image_graph_def"
    assert "299x299" in record["extractor"]["resize"]
    assert " FID " in result.stdout
    assert_refused(evaluate(smoke_bundle, "--data", pictures, "--inception", "fetch"), "download", "inception-2015")


def test_fewer_pictures_than_features_give_all_but_the_distance(
    smoke_bundle: Path, words: list[object], tmp_path: Path
) -> None:
    out, table = tmp_path / "few.json", tmp_path / "few.md"
    result = evaluate(smoke_bundle, *words, "--count", 8, "--json", out, "--markdown", table)
    assert result.exit_code == 0, result.output
    (why,) = (line for line in result.stderr.splitlines() if "no FD (tiny)" in line)
    assert "8 features" in why
    assert "9 pictures or more" in why
    (record,) = json.loads(out.read_text())["records"]
    assert record["value"] is None
    assert record["kid"] is not None
    assert 0 <= record["precision"] <= 1
    (row,) = (line for line in table.read_text().splitlines() if line.startswith("| GEN-2"))
    assert row.split("|")[4].strip() == "-"
    assert "±" in row
    beside = evaluate("compare", out, out)
    assert beside.exit_code == 0, beside.output
    assert "KID (tiny)" in beside.stdout
    assert "No FD (tiny)" in beside.stdout


WITHOUT_EFFECT = [["--prior", "normal"], ["--normalise", "none"], ["--latent-noise"], ["--snapshots"]]


@pytest.mark.parametrize("option", WITHOUT_EFFECT, ids=" ".join)
def test_what_a_bundle_has_settled_cannot_be_chosen(option: list[str], smoke_bundle: Path, words: list[object]) -> None:
    assert_refused(evaluate(smoke_bundle, *words, *option), f"{option[0]} ", "bundle", code=2)


def test_what_changes_no_measurement_of_a_run_is_refused(run: Path, words: list[object]) -> None:
    normal = [*words, "--prior", "normal"]
    assert_refused(evaluate(run, *normal, "--normalise", "scalar"), "--normalise is for fitted priors")
    assert_refused(evaluate(run, *normal, "--latent-noise"), "--latent-noise is the second stage's")
    assert_refused(evaluate(run, *words, "--plain"), "--plain is for runs that are sharpened")


def test_a_run_that_is_not_finished_is_measured_only_as_far_as_is_asked(
    run: Path, words: list[object], tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "stage2.keras").unlink()
    assert_refused(evaluate(copy, *words), "no prior 'second-stage' yet", "run train-vae to its end")
    assert evaluate(copy, *words, "--prior", "normal").exit_code == 0


def test_a_run_that_was_trained_on_meanwhile_keeps_no_measurement_of_what_it_was(run: Path, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run, tmp_path / "copy"))
    before, versions = copy.metrics, copy.versions
    keep(copy, {"metric": "FD"}, versions)
    assert copy.metrics == [*before, {"metric": "FD"}]
    shutil.copy(run / "stage1.keras", copy.path / "stage1.keras")
    with pytest.raises(RunError, match="trained on while it was measured"):
        keep(copy, {"metric": "KID"}, versions)
    assert copy.metrics == [*before, {"metric": "FD"}]


KEEPER = """
import sys
from pathlib import Path
from training.evaluation.measure import keep
from training.record.run import Run

run, seed, records = Run(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for count in range(records):
    keep(run, {"metric": "FD (tiny)", "count": count, "seed": seed}, {})
"""


def test_processes_that_measure_one_run_lose_nothing_of_each_other(tmp_path: Path) -> None:
    records, pipe = 60, subprocess.PIPE
    words = [sys.executable, "-c", KEEPER, str(tmp_path)]
    keepers = [
        subprocess.Popen([*words, str(seed), str(records)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for seed in range(3)
    ]
    for each in keepers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in keepers:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in keepers:
        _, said = each.communicate(timeout=900)
        assert each.returncode == 0, said
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert {(each["seed"], each["count"]) for each in kept} == {(s, n) for s in range(3) for n in range(records)}


@pytest.mark.parametrize("text", ["", '[{"metric": ', "{}", "[1]", "[" * 100_000])
def test_measurements_that_cannot_be_read_are_told_before_anything_is_measured(
    text: str, run: Path, words: list[object], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.json").write_text(text)
    result = evaluate(copy, *words)
    assert_refused(result, str(copy / "metrics.json"))
    assert len(result.stderr.strip().splitlines()) == 1
    assert_refused(evaluate("compare", copy), str(copy / "metrics.json"))
    assert (copy / "metrics.json").read_text() == text


def test_refusals(run: Path, words: list[object], pictures: Path, extractor_file: Path, tmp_path: Path) -> None:
    only_fd = ["--no-kid", "--no-precision-recall"]
    assert_refused(evaluate(run, *words, "--count", 8, *only_fd), "8 features", "takes 9", "Received: 8", "--count")
    assert_refused(evaluate(run, *words, "--count", 8, "--snapshots"), "Frechet distances", "takes 9")
    assert_refused(evaluate(run, *words, "--count", 3), "precision and recall take 4", "Received: 3")
    assert_refused(evaluate(run, *words, "--count", 1, "--no-precision-recall"), "take", "2", "Received: 1")
    assert_refused(evaluate(run, *words, "--prior", "gmm"), "no prior 'gmm'", "second-stage")
    assert_refused(evaluate(run, *words, "--split", "test"), "no test pictures", "train")
    assert_refused(evaluate(run, "--data", pictures), "--features", code=2)
    assert_refused(evaluate(run, *words, "--inception", "x"), "either", code=2)
    assert_refused(evaluate(tmp_path, *words), "not a finished run")
    (tmp_path / "no.onnx").write_text("hello")
    assert_refused(evaluate(tmp_path / "no.onnx", *words), "not a model of ours")
    assert_refused(evaluate("compare", tmp_path / "no.onnx"), "neither a run directory")
    shutil.copy(run / "config.json", tmp_path)
    assert_refused(evaluate("compare", tmp_path), "nothing was measured")
    assert_clear_error(command("evaluate-vae", run, "--no-such-flag"), "No such option", code=2)
