"""train-vae: what it leaves behind, and how it survives."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import BIN, assert_clear_error, command

LONG = ("--set", "epochs=12", "--set", "epochs2=1")


def weights(run: Path) -> list[np.ndarray]:
    import keras

    models = [keras.models.load_model(run / f"stage{stage}.keras", compile=False) for stage in (1, 2)]
    return [array for model in models for array in model.get_weights()]


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_a_run_directory(smoke_run: Path) -> None:
    assert sorted(path.name for path in smoke_run.iterdir()) == [
        "config.json",
        "diagnostics.json",
        "figures",
        "history.jsonl",
        "samples",
        "stage1.keras",
        "stage2.keras",
        "state",
    ]
    assert [(record["stage"], record["epoch"]) for record in records(smoke_run)] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for record in records(smoke_run):
        assert {"mse", "kl", "gamma", "active", "variance_law", "images_per_second", "lr"} <= set(record)
    assert Image.open(smoke_run / "samples" / "stage2.png").size == (8 * 16, 8 * 16)
    assert Image.open(smoke_run / "figures" / "history.png").size[0] > 800
    assert json.loads((smoke_run / "config.json").read_text())["recipe"]["name"] == "smoke"


def test_dry_run_prints_the_recipe_and_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command(
        "train-vae", "--recipe", "faces", "--data", pictures, "--out", out, "--set", "lr=0.01", "--dry-run"
    )
    assert result.returncode == 0, result.stderr
    assert "lr = 0.01" in result.stdout
    assert "48 pictures read" in result.stderr
    assert not out.exists()


def test_stopped_and_resumed_is_the_same_as_never_stopped(pictures: Path, tmp_path: Path) -> None:
    words = ["train-vae", "--recipe", "smoke", "--data", str(pictures), *LONG, "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*words, whole).returncode == 0
    with subprocess.Popen([BIN / words[0], *words[1:], cut], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2/12" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped and saved" in rest
    assert "Traceback" not in rest
    assert not (cut / "stage1.keras").exists()
    assert command(*words, cut).returncode == 0
    for one, two in zip(weights(whole), weights(cut), strict=True):
        assert np.array_equal(one, two)
    for one, two in zip(records(whole), records(cut), strict=True):
        assert (one["stage"], one["epoch"]) == (two["stage"], two["epoch"])
        assert one["mse"] == pytest.approx(two["mse"], rel=1e-5)


def test_jax_trains_the_same_recipe(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, KERAS_BACKEND="jax")
    assert result.returncode == 0, result.stderr
    exported = command("export-onnx", out, "--out", tmp_path / "jax.onnx")
    assert exported.returncode == 0, exported.stderr


def test_a_run_directory_belongs_to_one_recipe_and_one_folder(smoke_run: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out")
    assert_clear_error(command(*words, smoke_run, "--set", "lr=0.5"), "lr is 0.001 there and 0.5 here")
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(pictures.iterdir())[:5]:
        (other / path.name).write_bytes(path.read_bytes())
    assert_clear_error(command("train-vae", "--recipe", "smoke", "--data", other, "--out", smoke_run), "other pictures")
    assert_clear_error(command(*words, other), "new folder")
    assert "trained" in command(*words, smoke_run).stderr  # a finished run has nothing left to do


def test_a_damaged_state_is_one_line(pictures: Path, tmp_path: Path) -> None:
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run")
    assert command(*words, "--dry-run").returncode == 0
    state = tmp_path / "run" / "state"
    assert command(*words).returncode == 0
    (tmp_path / "run" / "stage1.keras").unlink()
    (state / "stage1.npz").write_bytes(b"PK\x03\x04 cut")
    assert_clear_error(command(*words), "cannot resume from", "stage1.npz", "delete it")


def test_a_full_disk_is_one_line_and_what_was_there_stays(pictures: Path, tmp_path: Path) -> None:
    words = [str(BIN / "train-vae"), "--recipe", "smoke", "--data", str(pictures), "--out", str(tmp_path / "run")]

    def small_files() -> None:  # the kernel refuses to write past this size, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files)
    assert_clear_error(result, "cannot write to")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".part")]
    assert len(records(tmp_path / "run")) == 2
    assert subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--recipe", "nonsense"), "there is no recipe 'nonsense'"),
        (("--recipe", "smoke", "--set", "base_dims=3"), "did you mean base_dim?"),
        (("--recipe", "smoke", "--set", "epochs=many"), "a whole number"),
        (("--recipe", "smoke", "--set", "side=48"), "power of two"),
        (("--recipe", "smoke", "--set", "batch=0"), "above zero"),
    ],
)
def test_usage_errors(words: tuple[str, ...], wanted: str, pictures: Path, tmp_path: Path) -> None:
    result = command("train-vae", *words, "--data", pictures, "--out", tmp_path / "run")
    assert_clear_error(result, wanted, code=2)
    assert not (tmp_path / "run").exists()
