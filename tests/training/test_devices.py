"""train-vae on several devices and on several machines: the result of one device, but for rounding."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import BIN, assert_clear_error, command, inside

EPOCHS = 6
QUICK = "--xla_backend_optimization_level=0"  # JAX compiles for longer than it trains here
ROUNDING = 1e-3  # relative, after the last epoch; Adam amplifies it where gradients are zero, in biases before norms


def words(pictures: Path, out: Path, *more: str, second: str = "epochs2=1") -> list[str]:
    short = [word for setting in (f"epochs={EPOCHS}", second, "sample_every=100") for word in ("--set", setting)]
    return ["train-vae", "--recipe", "smoke", "--data", str(pictures), "--out", str(out), *short, *more]


def last(run: Path, stage: int = 1) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    found: dict[str, float] = [record for record in records if record["stage"] == stage][-1]
    return found


def assert_same_training(one: Path, two: Path) -> None:
    """The terms of stage 1's loss, and what the trained encoder makes of the pictures, are equal to rounding."""
    wanted, got = last(one), last(two)
    assert got["epoch"] == wanted["epoch"] == EPOCHS
    for name in ("loss", "mse", "kl", "gamma"):
        assert got[name] == pytest.approx(wanted[name], rel=ROUNDING), name
    assert got["variance_law"] == pytest.approx(wanted["variance_law"], rel=2e-2)
    assert np.isfinite(last(two, stage=2)["loss"])


def cluster(count: int) -> list[str]:
    """Return each worker's TF_CONFIG, at ports of the loopback that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    tasks = [{"type": "worker", "index": index} for index in range(count)]
    return [json.dumps({"cluster": {"worker": addresses}, "task": task}) for task in tasks]


@pytest.fixture(scope="session")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give the run that one device makes, of which stage 1 is compared."""
    made: dict[str, Path] = {}

    def train(backend: str = "tensorflow") -> Path:
        if backend not in made:
            out = tmp_path_factory.mktemp("alone") / "run"
            start = words(pictures, out, second="priors=")
            here = backend == os.environ["KERAS_BACKEND"]
            result = inside(*start) if here else command(*start, KERAS_BACKEND=backend, XLA_FLAGS=QUICK)
            assert result.returncode == 0, result.stderr
            made[backend] = out
        return made[backend]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_as_one(backend: str, alone: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command(*words(pictures, out, "--devices", "2"), timeout=900, KERAS_BACKEND=backend, XLA_FLAGS=QUICK)
    assert result.returncode == 0, result.stderr
    assert_same_training(alone(backend), out)


@pytest.mark.slow
def test_two_devices_stopped_and_one_goes_on(alone: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start = words(pictures, out, "--devices", "2")
    with subprocess.Popen([BIN / start[0], *start[1:]], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if f"epoch 1/{EPOCHS}" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert not (out / "stage1.keras").exists()
    result = inside(*words(pictures, out))
    assert result.returncode == 0, result.stderr
    assert_same_training(alone(), out)


@pytest.mark.slow
def test_two_workers_train_as_one_and_the_first_keeps_the_run(
    alone: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    start = words(pictures, out)
    workers = []
    try:
        for config, log in zip(cluster(2), logs, strict=True):
            environment = {**os.environ, "TF_CONFIG": config, "TMPDIR": str(tmp_path)}
            with log.open("w") as file:
                workers.append(subprocess.Popen([BIN / start[0], *start[1:]], stderr=file, env=environment))
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(timeout=900) == 0, log.read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert_same_training(alone(), out)
    assert [log.read_text().count("stage 2 epoch 1/1") for log in logs] == [1, 0]
    assert [log.read_text().count("next: export-onnx") for log in logs] == [1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.log", "1.log", "run"]  # no scratch is left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "environment", "said"),
    [
        (("--devices", "3"), {}, ("multiple of 3", "Received: 16", "batch")),
        (("--devices", "3"), {"KERAS_BACKEND": "jax"}, ("multiple of 3", "Received: 16", "batch")),
        ((), {"TF_CONFIG": cluster(2)[0], "KERAS_BACKEND": "jax"}, ("KERAS_BACKEND=tensorflow", "Received: jax")),
        ((), {"TF_CONFIG": "{workers"}, ("TF_CONFIG takes JSON",)),
    ],
    ids=["tensorflow-uneven", "jax-uneven", "machines-of-jax", "broken-cluster"],
)
def test_errors(
    more: tuple[str, ...], environment: dict[str, str], said: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    assert_clear_error(command(*words(pictures, tmp_path / "run", *more), timeout=900, **environment), *said)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_devices_are_a_number_or_all(value: str, pictures: Path, tmp_path: Path) -> None:
    result = inside(*words(pictures, tmp_path / "run", "--devices", value))
    assert_clear_error(result, "a number of devices, or all", code=2)
