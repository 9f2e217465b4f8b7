"""export-onnx: one graph, proven equal to Keras, or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import onnx
import pytest

from export.chain import Affine, build
from export.convert import convert
from export.errors import VerificationError
from export.verify import verify
from serve.bundle import Bundle, check, load
from serve.engine import Engine
from serve.noise import draw
from tests.conftest import assert_clear_error, command
from training.normalise import Normalisation, fit
from training.run import Run


def test_one_input_one_output_and_a_card(smoke_bundle: Path) -> None:
    model = onnx.load(smoke_bundle)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "noise": (onnx.TensorProto.FLOAT, ["batch", 8]),
        "images": (onnx.TensorProto.UINT8, ["batch", 16, 16, 3]),
    }
    assert {each.domain for each in model.opset_import} == {""}
    card = load(smoke_bundle).card
    assert card.prior == "second-stage"
    assert card.normalisation["mode"] == "scalar"
    assert card.normalisation["draws"] == 100_000
    assert card.recipe["name"] == "smoke"
    assert card.dataset["count"] == 48


@pytest.mark.parametrize("prior", ["second-stage", "normal"])
@pytest.mark.parametrize("mode", ["none", "per-dimension"])
def test_the_graph_computes_what_the_run_does(smoke_run: Path, smoke_bundle: Path, prior: str, mode: str) -> None:
    """Against the networks called by hand, not through the chain that was exported."""
    run = Run(smoke_run)
    chain, constants = build(run, prior, mode, draws=5000)
    data = convert(chain, load(smoke_bundle).card, "float32")
    noise = draw(5, 0, 20, 8)
    latents = noise
    if prior == "second-stage":
        latents = np.asarray(run.load_networks(2).get_layer("decoder")(noise)) * constants.scale + constants.shift
    wanted = np.round(np.asarray(run.load_networks(1).get_layer("decoder")(latents)) * 255)
    images = Engine(Bundle(data, check(data), ""), device="cpu").run(noise)
    assert np.abs(images.astype(int) - wanted).max() <= 1


def test_normalisation_gives_samples_the_aggregates_moments() -> None:
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal((50_000, 3)) * [0.5, 0.8, 1.0] + [1, 0, -1]).astype(np.float32)
    mean, variance = [0.2, 0.0, 0.1], [1.0, 0.9, 1.1]
    each = fit("per-dimension", latents, mean, variance)
    moved = latents * each.scale + each.shift
    np.testing.assert_allclose(moved.mean(axis=0), mean, atol=1e-3)
    np.testing.assert_allclose(moved.var(axis=0), variance, rtol=1e-3)
    one = fit("scalar", latents, mean, variance)
    assert one.scale[0] == pytest.approx(1 / ((0.5 + 0.8 + 1.0) / 3), rel=1e-2)
    assert not one.shift.any()
    assert np.all(fit("none", latents, mean, variance).scale == 1)


def test_weights_stored_as_float16_are_half_the_file(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    result = command(
        "export-onnx", smoke_run, "--out", out, "--store", "float16", "--name", "half", "--licence", "mine"
    )
    assert result.returncode == 0, result.stderr
    assert out.stat().st_size < 0.8 * smoke_bundle.stat().st_size
    assert (load(out).card.name, load(out).card.licence) == ("half", "mine")
    onnx.checker.check_model(onnx.load(out), full_check=True)
    images = [Engine(load(path), device="cpu").sample(0, 0, 50).astype(int) for path in (out, smoke_bundle)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_graph_that_computes_something_else_is_refused(smoke_run: Path, smoke_bundle: Path) -> None:
    chain, constants = build(Run(smoke_run), "second-stage", "scalar", draws=1000)
    affine = next(layer for layer in chain.layers if isinstance(layer, Affine))
    affine.scale.assign(constants.scale * 3 + 1)
    with pytest.raises(VerificationError, match="grey levels"):
        verify(chain, load(smoke_bundle))


def test_a_normalisations_card() -> None:
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    assert Normalisation("none", ones, zeros, 0).card() == {"mode": "none"}
    assert Normalisation("scalar", ones, zeros, 9).card() == {"mode": "scalar", "scale": 1.0, "draws": 9}


def test_bad_input_is_one_line_and_leaves_nothing(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    assert_clear_error(command("export-onnx", tmp_path / "absent", "--out", out), "not a run directory", code=2)
    assert_clear_error(command("export-onnx", tmp_path, "--out", out), "not a finished run")
    assert_clear_error(command("export-onnx", smoke_run, "--out", smoke_bundle), "--force", code=2)
    assert_clear_error(command("export-onnx", smoke_run, "--out", tmp_path / "no" / "x.onnx"), "make it first", code=2)

    broken = tmp_path / "broken"
    shutil.copytree(smoke_run, broken)
    (broken / "stage2.keras").unlink()
    assert_clear_error(command("export-onnx", broken, "--out", out), "has no stage2.keras")
    (broken / "stage1.keras").write_bytes(b"cut")
    assert_clear_error(command("export-onnx", broken, "--out", out), "stage1.keras")
    config = json.loads((broken / "config.json").read_text())
    config["recipe"]["new_setting"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    assert_clear_error(command("export-onnx", broken, "--out", out), "another version", "new_setting")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
