"""Going on with a run: what may change, what is kept, and what is undone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import pytest

from tests.conftest import assert_clear_error, inside, last_line


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder that another start had before, in vain."""
    out = tmp_path_factory.mktemp("going-on") / "run"
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out)
    failed = inside(*words, "--set", "lr=1e18", "--save-every", 10_000)
    assert_clear_error(failed, "none was saved", "Train anew with a lower lr")
    assert (out / "config.json").exists()
    for name in ("samples/stage1-0009.png", "snapshots/stage1-0009.keras"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    result = inside(*words)  # what was advised is not refused, as nothing was trained
    assert result.returncode == 0, result.stderr
    return out


def test_what_was_given_up_leaves_nothing_that_passes_for_the_run(run: Path) -> None:
    assert not (run / "snapshots").exists()
    assert not (run / "samples" / "stage1-0009.png").exists()


def weights(path: Path) -> list[np.ndarray]:
    return list(keras.models.load_model(path, compile=False).get_weights())


def test_a_run_that_nobody_can_tell_what_it_is_stays(run: Path, pictures: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "config.json").unlink()
    refused = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", copy)
    assert_clear_error(refused, "config.json is gone", "choose another --out")
    assert (copy / "stage2.keras").exists()


def test_another_prior_trains_nothing_again(run: Path, pictures: Path) -> None:
    before = [(run / name).stat().st_mtime_ns for name in ("stage1.keras", "stage2.keras")]
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", run)
    result = inside(*words, "--set", "priors=gmm", "--set", "gmm_components=2")
    assert result.returncode == 0, result.stderr
    assert "epoch 1/" not in result.stderr
    assert (run / "prior-gmm.keras").exists()
    assert (run / "samples" / "gmm.png").exists()
    assert before == [(run / name).stat().st_mtime_ns for name in ("stage1.keras", "stage2.keras")]
    assert json.loads((run / "config.json").read_text())["recipe"]["priors"] == ["second-stage", "gmm"]
    assert_clear_error(inside(*words, "--set", "gmm_components=3", "--set", "priors=gmm"), "gmm_components is 2 there")


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("batch=8", "batch is 16 there and 8 here, and cannot change; choose another --out"),
        ("epochs=1", "epochs is 2 there and 1 here, and cannot change to fewer"),
        ("second_dim=9", "second_dim is 16 there and 9 here, and cannot change"),
        ("lr2=1", "or delete stage2.keras and state/stage2.npz there to train stage 2 anew"),
        ("epochs=3 warm_up=9", "warm_up is 0 there and 9 here, and cannot change"),  # or 3 were not what they are alone
    ],
)
def test_what_cannot_change_is_named(setting: str, wanted: str, run: Path, pictures: Path) -> None:
    words = [word for each in setting.split() for word in ("--set", each)]
    assert_clear_error(inside("train-vae", "--data", pictures, "--out", run, *words), wanted)


def test_stage_2_alone_is_trained_anew(run: Path, pictures: Path, tmp_path: Path) -> None:
    """As the error of a divergence and of settings that cannot change advise; what was measured of it goes."""
    copy = shutil.copytree(run, tmp_path / "copy")
    measured = [{"metric": "FD", "prior": prior} for prior in ("normal", "second-stage")]
    (copy / "metrics.json").write_text(json.dumps(measured))
    for name in ("stage2.keras", "state/stage2.npz"):
        (copy / name).unlink()
    before = weights(copy / "stage1.keras")
    result = inside("train-vae", "--data", pictures, "--out", copy, "--set", "lr2=2e-3", "--set", "epochs2=3")
    assert result.returncode == 0, result.stderr
    assert all(np.array_equal(*pair) for pair in zip(before, weights(copy / "stage1.keras"), strict=True))
    records = [json.loads(line) for line in (copy / "history.jsonl").read_text().splitlines()]
    assert [(each["stage"], each["epoch"]) for each in records] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert json.loads((copy / "metrics.json").read_text()) == measured[:1]


def test_more_epochs_are_the_same_as_if_there_had_been_so_many(run: Path, pictures: Path, tmp_path: Path) -> None:
    """And what was fitted to the latents before is fitted anew."""
    old = weights(run / "stage2.keras")
    long = ("--set", "epochs=4", "--set", "sample_every=3")
    gone_on = inside("train-vae", "--data", pictures, "--out", run, *long)
    assert gone_on.returncode == 0, gone_on.stderr
    assert "going on in epoch 3/4 of stage 1" in gone_on.stderr
    assert "next: export-onnx" in last_line(gone_on)
    words = ("--set", "priors=second-stage,gmm", "--set", "gmm_components=2")
    at_once = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run", *long, *words)
    assert at_once.returncode == 0, at_once.stderr
    for name in ("stage1", "stage2", "prior-gmm"):
        pairs = zip(weights(run / f"{name}.keras"), weights(tmp_path / "run" / f"{name}.keras"), strict=True)
        assert all(np.array_equal(one, two) for one, two in pairs), name
    assert not all(np.array_equal(*pair) for pair in zip(old, weights(run / "stage2.keras"), strict=True))
    epochs = [json.loads(line)["epoch"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4, 1, 2]
    # Without the state there is nothing to go on from, and what was trained stays.
    (run / "state" / "stage1.npz").unlink()
    refused = inside("train-vae", "--data", pictures, "--out", run, "--set", "epochs=9")
    assert_clear_error(refused, "stage1.npz is gone", "--from")
    assert (run / "stage1.keras").exists()
