"""Going on with a run: what may change, what is kept, and what is undone."""

from __future__ import annotations

import json
import os
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
    result = inside(*words)  # what was advised is not refused, as nothing was trained
    assert result.returncode == 0, result.stderr
    return out


def weights(path: Path) -> list[np.ndarray]:
    return list(keras.models.load_model(path, compile=False).get_weights())


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
    ],
)
def test_what_cannot_change_is_named(setting: str, wanted: str, run: Path, pictures: Path) -> None:
    assert_clear_error(inside("train-vae", "--data", pictures, "--out", run, "--set", setting), wanted)


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
