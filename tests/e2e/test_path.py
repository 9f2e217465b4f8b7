"""The four lines of the README, on real faces where they are at hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import load
from tests.conftest import command, serving

SMALL = (
    *("side=32", "base_dim=4", "fc_dim=16", "second_dim=32", "num_scale=3"),
    *("epochs=1", "epochs2=1", "epochs3=0", "validation=0"),
)


@pytest.mark.slow
def test_train_export_serve_sample_on_celeba(shared: Callable[[str], Path], tmp_path: Path) -> None:
    tool = shared("tools/unpack-data")
    subprocess.run([sys.executable, tool, tmp_path, "celeba"], check=True)
    data, run, model, out = tmp_path / "celeba64", tmp_path / "run", tmp_path / "mine.onnx", tmp_path / "faces"
    for path in sorted(data.iterdir())[1000:]:
        path.unlink()
    settings = [word for setting in SMALL for word in ("--set", setting)]
    trained = command("train-vae", "--recipe", "faces", "--data", data, "--out", run, *settings)
    assert trained.returncode == 0, trained.stderr
    assert "pictures: 1,000 train; 0 broken" in trained.stderr
    exported = command("export-onnx", run, "--out", model)
    assert exported.returncode == 0, exported.stderr
    with serving("--model", model) as (address, _):
        sampled = command("sample-cli", "--server", address, "--n", 30, "--out", out)
    assert sampled.returncode == 0, sampled.stderr
    assert len(list(out.glob("*.png"))) == 30
    card = load(model).card
    assert (card.name, card.image_shape, card.dataset["count"]) == ("mine", (32, 32, 3), 1000)
