"""train-vae: what it leaves behind, and how it survives."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import signal
import subprocess
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import BIN, assert_clear_error, command, inside, last_line

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
        "tensorboard",
        "trace.jsonl",
    ]
    assert [(record["stage"], record["epoch"]) for record in records(smoke_run)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for record in records(smoke_run):
        assert {"mse", "kl", "gamma", "active", "variance_law", "images_per_second", "lr"} <= set(record)
        assert len(record["latent_variance"]) == record["latents"]
    assert Image.open(smoke_run / "samples" / "second-stage.png").size == (8 * 16, 8 * 16)
    assert Image.open(smoke_run / "figures" / "history.png").size[0] > 800
    assert json.loads((smoke_run / "config.json").read_text())["recipe"]["name"] == "smoke"


def test_dry_run_prints_the_recipe_and_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = inside("train-vae", "--recipe", "faces", "--data", pictures, "--out", out, "--set", "lr=0.01", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "lr = 0.01" in result.stdout
    assert "pictures: 42 train, 6 validation; 0 broken, 0 ignored" in result.stderr
    assert not out.exists()


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = command("train-vae", "--recipe", "smoke", "--data", pictures, *LONG, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_is_the_same_as_never_stopped(
    how: signal.Signals, whole: Path, pictures: Path, tmp_path: Path
) -> None:
    """Bit by bit: the weights, and the records. SIGKILL finds the process between two checkpoints, in mid-epoch."""
    words = ["train-vae", "--recipe", "smoke", "--data", str(pictures), *LONG, "--save-every", "0.3", "--out"]
    cut = tmp_path / "cut"
    with subprocess.Popen([BIN / words[0], *words[1:], cut], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 4/12" in line:
                process.send_signal(how)
                break
        rest = process.stderr.read()
        process.wait(timeout=600)
    assert "Traceback" not in rest
    if how == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped and saved" in rest
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (cut / "stage1.keras").exists()
    assert (cut / "state" / "stage1.npz").exists()
    assert command(*words, cut).returncode == 0
    for one, two in zip(weights(whole), weights(cut), strict=True):
        assert np.array_equal(one, two)
    for one, two in zip(records(whole), records(cut), strict=True):
        assert (one["stage"], one["epoch"]) == (two["stage"], two["epoch"])
        assert one["mse"] == pytest.approx(two["mse"], rel=1e-5)
        assert one["latent_variance"] == two["latent_variance"]
    traces = [(run / "trace.jsonl").read_text() for run in (whole, cut)]
    assert traces[0] == traces[1]


def begun(path: Path, process: subprocess.Popen[str], since: int = 0) -> None:
    """Wait until a file is there, written after a time."""
    while not (path.exists() and path.stat().st_mtime_ns > since):
        if process.poll() is not None:
            pytest.fail(str(process.stderr and process.stderr.read()))
        select.select([], [], [], 0.01)  # a file cannot be waited for


@pytest.mark.slow
def test_a_signal_after_stage_1_stops_the_run_too(pictures: Path, tmp_path: Path) -> None:
    """While posteriors are taken, a mixture is fitted, and figures are drawn; the end is that of a run not stopped."""
    words = ["train-vae", "--recipe", "smoke", "--data", str(pictures), "--set", "priors=gmm,second-stage"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*words, "--out", whole).returncode == 0
    after = {"stage1.keras": signal.SIGINT, "diagnostics.json": signal.SIGTERM, "samples/normal.png": signal.SIGINT}
    for name, how in after.items():
        since = time.time_ns()
        full = [str(BIN / words[0]), *words[1:], "--out", str(cut)]
        with subprocess.Popen(full, stderr=subprocess.PIPE, text=True) as process:
            begun(cut / name, process, since)
            process.send_signal(how)
            assert process.stderr is not None
            rest = process.stderr.read()
        assert process.returncode == 128 + how, rest
        assert rest.splitlines()[-1] == f"stopped and saved in {cut}; the same command goes on from here"
        assert not list(cut.rglob(".part-*"))
    assert "trained" in command(*words, "--out", cut).stderr
    for name in ("stage1", "prior-gmm", "stage2"):
        assert contents(whole / f"{name}.keras") == contents(cut / f"{name}.keras")
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (cut / "samples" / path.name).read_bytes()


def contents(model: Path) -> list[bytes]:
    """Every weight in a .keras file."""
    import keras

    return [array.tobytes() for array in keras.models.load_model(model, compile=False).get_weights()]


def test_how_it_is_executed_changes_nothing(pictures: Path, tmp_path: Path, smoke_run: Path) -> None:
    """Several minibatches a call, and a checkpoint after every one: the same weights."""
    words = ("train-vae", "--recipe", "smoke", "--data", pictures)
    result = command(*words, "--steps-per-execution", 3, "--save-every", 0, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    for one, two in zip(weights(smoke_run), weights(tmp_path / "run"), strict=True):
        assert np.array_equal(one, two)


def test_the_balances_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """gamma and m come back as they were, whatever the policy."""
    import keras

    from training.model.build import latent_vae
    from training.recipe import BALANCES
    from training.recipes import recipe
    from training.record.run import Run
    from training.record.stage import Position

    for name in BALANCES:
        run = Run(tmp_path / name)
        wanted = replace(recipe("smoke"), balance2=name, gamma2=0.5)
        before, after = latent_vae(wanted, 3), latent_vae(wanted, 3)
        for _ in range(5):
            before.balance(keras.ops.convert_to_tensor(0.1), training=True)
        if name == "learned":
            before.balance.log_gamma.assign(-1.5)
        run.save_state(2, before.balance.weights, Position())
        run.load_state(2, after.balance.weights)
        for training in (False, True):
            one, two = (each.balance(keras.ops.convert_to_tensor(0.1), training=training) for each in (before, after))
            assert list(map(float, one)) == list(map(float, two))
            assert float(one[0]) < 1


def test_training_that_blows_up_says_what_did_and_keeps_the_last_checkpoint(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, "--save-every", 0)
    result = inside(*words, "--set", "lr=1e18")
    assert_clear_error(result, "stage 1 diverged in epoch", "stopped being finite", "is kept", "lower lr")
    assert any(term in last_line(result) for term in ("mse", "kl", "the weight"))
    with np.load(out / "state" / "stage1.npz") as state:
        assert all(np.isfinite(state[name]).all() for name in state.files)


def test_two_processes_cannot_train_in_one_directory(pictures: Path, tmp_path: Path) -> None:
    words = ["train-vae", "--recipe", "smoke", "--data", str(pictures), "--out", str(tmp_path / "run")]
    words += ["--set", "epochs=2000"]
    with subprocess.Popen([BIN / words[0], *words[1:]], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "epoch 1/" in line)
        assert_clear_error(command(*words), "another process is training in")
        process.send_signal(signal.SIGKILL)  # the lock goes with the process
        process.stderr.read()
    with subprocess.Popen([BIN / words[0], *words[1:]], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("stage 1 epoch"))
        process.send_signal(signal.SIGTERM)
        assert "stopped and saved" in process.stderr.read()


def test_validation_pictures_are_held_back_and_measured(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, "--set", "validation=0.3")
    assert result.returncode == 0, result.stderr
    assert "validation" in result.stderr
    first, second = (record for record in records(out) if record["stage"] == 1)
    assert 0 < second["validation_mse"] < 1
    assert first["images"] < 48


def test_snapshots_are_kept_where_the_recipe_asks(pictures: Path, tmp_path: Path) -> None:
    import keras

    out = tmp_path / "run"
    settings = ("--set", "epochs=4", "--set", "snapshot_every=2", "--set", "first_stage=rae-sn")
    assert inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, *settings).returncode == 0
    assert sorted(path.name for path in (out / "snapshots").iterdir()) == ["stage1-0002.keras", "stage1-0004.keras"]
    last, end = (keras.models.load_model(path) for path in (out / "snapshots/stage1-0004.keras", out / "stage1.keras"))
    for one, two in zip(last.get_weights(), end.get_weights(), strict=True):
        assert np.array_equal(one, two)


def test_the_rate_rises_from_nothing(pictures: Path, tmp_path: Path) -> None:
    """Warmed up for long, the first epoch hardly moves a weight; warmed up for a step, it does."""
    from training.model.build import image_autoencoder
    from training.recipes import recipe

    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--set", "priors=gaussian", "--set", "epochs=1")
    kernels = {}
    for steps in (1, 10**9):
        out = tmp_path / str(steps)
        result = inside(*words, "--set", f"warm_up={steps}", "--out", out)
        assert result.returncode == 0, result.stderr
        (kernels[steps],) = (each for each in contents_by_name(out / "stage1.keras") if each[0] == "stem")
    (start,) = (layer.get_weights()[0] for layer in image_autoencoder(recipe("smoke")).encoder.layers[1:2])
    moved = {steps: np.abs(kernel - start).max() for steps, (_, kernel) in kernels.items()}
    assert moved[10**9] < 1e-7 < 1e-4 < moved[1]


def contents_by_name(model: Path) -> list[tuple[str, np.ndarray]]:
    """The encoder's kernels, by the names of their layers."""
    import keras

    encoder = keras.models.load_model(model, compile=False).get_layer("encoder")
    return [(layer.name, layer.get_weights()[0]) for layer in encoder.layers if layer.weights]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_train_the_same_recipe(backend: str, pictures: Path, tmp_path: Path) -> None:
    """A RAE-GP, whose derivatives are ours, and a critic of it; and no other backend goes on with it."""
    if find_spec(backend) is None:
        pytest.skip(f"needs {backend}, which is not installed")
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run")
    words += ("--set", "first_stage=rae-gp", "--set", "priors=gaussian", "--set", "epochs3=1", "--set", "critic_dim=2")
    result = command(*words, KERAS_BACKEND=backend, XLA_FLAGS="--xla_backend_optimization_level=0")  # quick to compile
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["backend"] == backend
    from training.record.run import Run

    before, after = (Run(tmp_path / "run").decoder(plain=each).get_weights() for each in (True, False))
    assert not all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    refused = command(*words, KERAS_BACKEND="tensorflow")
    assert_clear_error(refused, f"is trained with KERAS_BACKEND={backend}; set that", "Received: tensorflow")
    exported = command("export-onnx", tmp_path / "run", "--out", tmp_path / "x.onnx", KERAS_BACKEND=backend)
    assert exported.returncode == 0, exported.stderr


def test_mixed_precision_is_stage_1s_alone(pictures: Path, tmp_path: Path) -> None:
    """A mixture that is fitted right after it, and the second stage, compute in float32; the run can be exported."""
    import keras

    out = tmp_path / "run"
    settings = ("--set", "precision=mixed_bfloat16", "--set", "priors=gmm,second-stage")
    result = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, *settings)
    assert result.returncode == 0, result.stderr
    first = [record for record in records(out) if record["stage"] == 1]
    assert first[-1]["mse"] < first[0]["mse"]
    for name in ("prior-gmm", "stage1", "stage2"):
        model = keras.models.load_model(out / f"{name}.keras", compile=False)
        assert {layer.compute_dtype for layer in model._flatten_layers()} == {"float32"}, name
    for prior in ("gmm", "second-stage"):
        result = inside("export-onnx", out, "--prior", prior, "--out", tmp_path / f"{prior}.onnx")
        assert result.returncode == 0, result.stderr


def test_what_nothing_can_come_of_is_told_before_pictures_are_read(tmp_path: Path) -> None:
    """Reading takes minutes, of many: here there are none, and it would say that."""
    data, out = tmp_path / "none", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (out / "mine").touch()
    words = ("train-vae", "--data", data, "--out")
    named = ("--recipe", "smoke")
    assert_clear_error(inside(*words, tmp_path / "x", "--set", "sidee=32"), "did you mean side?")
    for wrong, why in (
        ("side=large", "side takes a whole number"),
        ("batch=0", "batch must be"),
        ("priors=x", "takes"),
    ):
        assert_clear_error(inside(*words, tmp_path / "x", "--set", wrong), why)
    assert_clear_error(inside(*words, out), "--out takes a new folder or one of train-vae's")
    assert_clear_error(inside(*words, out, *named), "--out takes a new folder or one of train-vae's")
    assert_clear_error(inside(*words, tmp_path / "x", *named, "--from", data), "--from takes a finished run")


def test_a_run_directory_belongs_to_one_recipe_and_one_folder(smoke_run: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out")
    assert_clear_error(inside(*words, smoke_run, "--set", "lr=0.5"), "lr is 0.001 there and 0.5 here")
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(pictures.iterdir())[:5]:
        (other / path.name).write_bytes(path.read_bytes())
    assert_clear_error(inside("train-vae", "--recipe", "smoke", "--data", other, "--out", smoke_run), "other pictures")
    assert_clear_error(inside(*words, other), "new folder")
    assert "trained" in inside(*words, smoke_run).stderr  # a finished run has nothing left to do


def test_a_checkpoint_of_another_recipe_is_one_line(pictures: Path, smoke_run: Path, tmp_path: Path) -> None:
    """Moved there by hand: config.json says otherwise."""
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--set", "epochs=100", "--save-every", 0, "--out")
    states = []
    for name, extra in (("one", ()), ("two", ("--set", "base_dim=6"))):
        full = [str(word) for word in (BIN / words[0], *words[1:], tmp_path / name, *extra)]
        with subprocess.Popen(full, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if "epoch 1/" in line)
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
        states.append(tmp_path / name / "state" / "stage1.npz")
    states[0].write_bytes(states[1].read_bytes())
    assert_clear_error(inside(*words, tmp_path / "one"), "cannot resume from", "stage1.npz", "shape")


def test_a_damaged_state_is_one_line(pictures: Path, smoke_run: Path, tmp_path: Path) -> None:
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run")
    assert inside(*words, "--dry-run").returncode == 0
    state = tmp_path / "run" / "state"
    assert inside(*words).returncode == 0
    (tmp_path / "run" / "stage1.keras").unlink()
    (state / "stage1.npz").write_bytes(b"PK\x03\x04 cut")
    assert_clear_error(inside(*words), "cannot resume from", "stage1.npz", "delete it")
    assert_clear_error(inside(*words, "--from", smoke_run), "did not start from the weights of --from")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["from"] = hashlib.sha256((smoke_run / "stage1.keras").read_bytes()).hexdigest()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert_clear_error(inside(*words, "--from", smoke_run), "cannot resume from", "stage1.npz", "delete it")


def test_a_full_disk_is_one_line_and_what_was_there_stays(pictures: Path, tmp_path: Path) -> None:
    words = [str(BIN / "train-vae"), "--recipe", "smoke", "--data", str(pictures), "--out", str(tmp_path / "run")]

    def small_files() -> None:  # the kernel refuses to write past this size, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    result = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files)
    assert_clear_error(result, "cannot write to")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".part")]
    assert len(records(tmp_path / "run")) >= 1
    assert subprocess.run(words, capture_output=True).returncode == 0


def test_data_that_can_no_longer_be_read_is_what_the_error_names(tmp_path: Path) -> None:
    data, out = tmp_path / "pictures.npy", tmp_path / "run"
    np.save(data, np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8))
    words = ["--recipe", "smoke", "--data", str(data), "--out", str(out), "--set", "epochs=100000"]
    with subprocess.Popen([BIN / "train-vae", *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "epoch 1/" in line)
        os.truncate(data, 1000)
        rest = process.stderr.read()
    assert process.returncode == 1, rest
    assert rest.splitlines()[-1] == f"Error: cannot read {data}: it was cut short while it was in use"


def test_a_folder_that_cannot_be_written_to_is_what_the_error_names(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("--recipe", "smoke", "--data", pictures, "--out", tmp_path / "file" / "run")
    assert_clear_error(inside("train-vae", *words), f"cannot write to {tmp_path / 'file' / 'run'}: ")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--recipe", "smoke", "--set", "gamma=0.5"), "gamma changes nothing in this recipe: it counts with first_sta"),
        (("--recipe", "smoke", "--set", "seed=4294967296"), "seed must be below 2**32"),
        (("--recipe", "nonsense"), "there is no recipe 'nonsense'"),
        (("--recipe", "smoke", "--set", "base_dims=3"), "did you mean base_dim?"),
        (("--recipe", "smoke", "--set", "epochs=many"), "a whole number"),
        (("--recipe", "smoke", "--set", "side=48"), "power of two"),
        (("--recipe", "smoke", "--set", "batch=0"), "batch must be above zero"),
        (("--recipe", "smoke", "--set", "limit=-1"), "limit must be zero or more"),
    ],
)
def test_usage_errors(words: tuple[str, ...], wanted: str, pictures: Path, tmp_path: Path) -> None:
    result = inside("train-vae", *words, "--data", pictures, "--out", tmp_path / "run")
    assert_clear_error(result, wanted, code=2)
    assert not (tmp_path / "run").exists()
