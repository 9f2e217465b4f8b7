"""export-onnx: one graph, proven equal to Keras, or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from export.bundles.pack import pack
from export.bundles.verify import verify
from export.chain import build
from export.cli import main
from export.convert import convert
from export.errors import LimitError, VerificationError
from export.exportable import Exportable, from_bundle, from_run
from export.passes import optimise
from export.passes.graph import constant
from export.pipeline import Limits, export
from export.session import decoder
from serve.bundle import load
from serve.card import Card
from serve.engine import Engine
from serve.noise import draw
from tests.conftest import assert_clear_error, command, inside
from training.errors import RunError
from training.evaluation.cli import main as evaluate_vae
from training.evaluation.compare import read
from training.model.normalise import Normalisation, fit
from training.record.run import Run


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
    assert (card.precision, card.store, card.difference) == ("fp32", "float32", {})
    report = card.verification
    assert set(report["agreement"]) == {"1", "7", "64", "256"}
    assert all(each["max"] <= 1 for each in report["agreement"].values())
    assert {7, 64, 256} <= set(report["same_bytes_in_batches"])
    assert report["fast"]["float16"]["mean"] < 0.1


def test_every_layer_is_found_by_its_name_and_nothing_is_left_over(smoke_bundle: Path) -> None:
    graph = onnx.load(smoke_bundle).graph
    names = {node.name for node in graph.node}
    assert {"stage2/dense_0", "stage2/latents", "stage1/up8", "stage1/scale16_0_0_conv", "stage1/pixels"} <= names
    kinds = [node.op_type for node in graph.node]
    # What the passes leave of normalisation, layout and rounding.
    assert kinds.count("Transpose") == 1
    assert not {"MatMul", "Mul", "Round", "Cast", "Identity"} & set(kinds)
    assert kinds[-2:] == ["QuantizeLinear", "Transpose"]
    read = {name for node in graph.node for name in node.input}
    assert {each.name for each in graph.initializer} <= read


@pytest.mark.parametrize("prior", ["second-stage", "normal"])
@pytest.mark.parametrize("mode", ["none", "per-dimension"])
def test_the_graph_computes_what_the_run_does(smoke_run: Path, prior: str, mode: str) -> None:
    """Against the networks called by hand, not through the chain that was exported."""
    run = Run(smoke_run)
    chain, constants = build(run, prior, mode, draws=5000)
    model = convert(chain)
    optimise(model)
    noise = draw(5, 0, 20, 8)
    latents = noise
    if prior == "second-stage":
        latents = np.asarray(run.load_networks(2).get_layer("decoder")(noise)) * constants.scale + constants.shift
    wanted = np.round(np.asarray(run.load_networks(1).get_layer("decoder")(latents)) * 255)
    assert np.abs(decoder(model)(noise).astype(int) - wanted).max() <= 1


def test_normalisation_gives_samples_the_aggregates_moments() -> None:
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal((50_000, 3)) * [0.5, 0.8, 1.0] + [1, 0, -1]).astype(np.float32)
    mean, variance = [0.2, 0.0, 0.1], [1.0, 0.9, 1.1]
    each = fit("per-dimension", latents, mean, variance)
    moved = latents * each.scale + each.shift
    np.testing.assert_allclose(moved.mean(axis=0), mean, atol=1e-3)
    np.testing.assert_allclose(moved.var(axis=0), variance, rtol=1e-3)
    one = fit("scalar", latents, mean, variance)
    assert (latents * one.scale).var(axis=0).mean() == pytest.approx(np.mean(variance), rel=1e-4)
    assert not one.shift.any()
    assert np.all(fit("none", latents, mean, variance).scale == 1)


def test_guarded_normalisation_is_for_runs_that_lost_variance(smoke_run: Path, tmp_path: Path) -> None:
    """The paper's rule, on this run with another last error of stage 2: much or little beside the same loss."""
    run = Run(tmp_path / "run")
    shutil.copytree(smoke_run, run.path)
    # The posteriors' means vary more than anything that is drawn here.
    known = run.diagnostics
    known["aggregate_variance"] = [variance + 100 for variance in known["posterior_variance"]]
    (run.path / "diagnostics.json").write_text(json.dumps(known))
    *others, last = run.history()
    assert last["stage"] == 2
    modes = []
    for mse in (1e-6, 1e6):
        lines = [*others, {**last, "mse": mse}]
        (run.path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        _, constants = build(run, "second-stage", "guarded", draws=1000)
        modes.append(constants.mode)
    assert modes == ["scalar", "none"]
    assert constants.card() == {"mode": "none"}
    (run.path / "history.jsonl").unlink()
    with pytest.raises(RunError, match="no history"):
        build(run, "second-stage", "guarded", draws=1000)


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


def test_latents_come_out_beside_images(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    exportable = from_run(smoke_run, "both", with_latents=True)
    (bundle,) = export(exportable, {"fp32": tmp_path / "both.onnx"})
    outputs = [
        (value.name, value.type.tensor_type.elem_type) for value in onnx.load(tmp_path / "both.onnx").graph.output
    ]
    assert outputs == [("images", onnx.TensorProto.UINT8), ("latents", onnx.TensorProto.FLOAT)]
    # The engine takes it as any other, and its pictures are the same.
    images = Engine(bundle, device="cpu").sample(3, 0, 20)
    assert np.abs(images.astype(int) - Engine(load(smoke_bundle), device="cpu").sample(3, 0, 20)).max() <= 1


@pytest.fixture
def exportable(smoke_bundle: Path) -> Exportable:
    return from_bundle(smoke_bundle, "again")


def test_a_graph_that_computes_something_else_is_refused(exportable: Exportable, tmp_path: Path) -> None:
    other = dataclasses.replace(exportable, reference=lambda noise: 255 - exportable.reference(noise))
    with pytest.raises(VerificationError, match="grey levels"):
        export(other, {"fp32": tmp_path / "x.onnx"})
    assert not list(tmp_path.iterdir())


def test_a_graph_that_overflows_is_refused(exportable: Exportable) -> None:
    """Noise beyond what the usual samples hold has to give numbers too."""
    optimise(exportable.model)
    first = next(node for node in exportable.model.graph if node.op_type == "Gemm")
    kernel = constant(first.inputs[1])
    assert kernel is not None
    huge = kernel.copy()
    huge[0] = np.where(huge[0] > 0, 3e37, -3e37)
    first.inputs[1].const_value = ir.tensor(huge)  # type: ignore[union-attr]
    graph = decoder(exportable.model)
    with pytest.raises(VerificationError, match="8 times as large as usual gives NaN or infinite"):
        verify(pack(exportable.model, exportable.card), graph, "itself")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_are_measured_against_fp32(exportable: Exportable, tmp_path: Path, precision: str) -> None:
    outs = {"fp32": tmp_path / "fp32.onnx", precision: tmp_path / "other.onnx"}
    export(exportable, outs, limits=Limits(count=300, mean=1.0))
    cards: list[Card] = [load(path).card for path in outs.values()]
    assert [card.name for card in cards] == ["again-fp32", f"again-{precision}"]
    found = cards[1].difference
    pictures = [Engine(load(path), device="cpu").sample(1, 0, 300).astype(int) for path in outs.values()]
    apart = np.abs(pictures[0] - pictures[1])
    assert found["from"] == "fp32"
    assert found["samples"] == 300
    assert 0 < found["mean"] <= 1.0
    assert found["mean"] == pytest.approx(apart.mean(), rel=0.05)
    assert found["worst"] >= apart.max() - 1
    kinds = {node.op_type for node in onnx.load(outs[precision]).graph.node}
    assert ("QuantizeLinear" in kinds and "DequantizeLinear" in kinds) if precision == "int8" else "Cast" in kinds


def test_int8_keeps_layers_float_to_stay_within_the_limit(exportable: Exportable, tmp_path: Path) -> None:
    cards = []
    for limit in (255.0, 0.1):
        out = tmp_path / f"{limit}.onnx"
        export(exportable, {"int8": out}, limits=Limits(count=200, mean=limit))
        cards.append(load(out).card)
    loose, tight = (card.difference for card in cards)
    assert loose["float_layers"] == []
    assert len(tight["float_layers"]) > 0
    assert tight["mean"] <= 0.1 < loose["mean"]


def test_beyond_the_limits_nothing_is_written(exportable: Exportable, tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="--limit-mean"):
        export(
            exportable, {"fp32": tmp_path / "a.onnx", "int8": tmp_path / "b.onnx"}, limits=Limits(count=50, mean=1e-6)
        )
    assert not list(tmp_path.iterdir())


def test_int8_samples_do_not_depend_on_the_processor(exportable: Exportable, tmp_path: Path) -> None:
    """Two products of a weight and an activation have to fit into 16 bits, where x86 without VNNI adds them."""
    export(exportable, {"int8": tmp_path / "x.onnx"}, limits=Limits(count=50, mean=255))
    model = ir.load(tmp_path / "x.onnx")
    weights = [
        value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value is not None
    ]
    eights = [array for array in weights if array.dtype == np.int8 and array.ndim > 1]
    assert len(eights) > 5
    assert max(np.abs(array.astype(int)).max() for array in eights) * 2 * 255 < 2**15


@pytest.fixture
def tiny_extractor(tmp_path: Path) -> Path:
    """The mean colour of a picture."""
    text = """<ir_version: 10, opset_import: ["": 18]> mean (uint8[n,h,w,3] images) => (float[n,3] features) {
        axes = Constant<value = int64[2] {1, 2}>()
        wide = Cast<to = 1>(images)
        features = ReduceMean<keepdims = 0>(wide, axes)
    }"""
    path = tmp_path / "extractor" / "mean.onnx"
    path.parent.mkdir()
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_the_frechet_distance_is_kept_within_its_limit(
    exportable: Exportable, pictures: Path, tmp_path: Path, tiny_extractor: Path
) -> None:
    limits = Limits(count=300, mean=255, shift=1e9, features=tiny_extractor, pictures=pictures)
    export(exportable, {"int8": tmp_path / "x.onnx"}, limits=limits)
    found = load(tmp_path / "x.onnx").card.difference
    words = [
        "--data",
        pictures,
        "--features",
        tiny_extractor,
        "--count",
        300,
        "--seed",
        1,
        "--cache",
        tmp_path / "cache",
    ]
    more = ["--no-kid", "--no-precision-recall", "--json", tmp_path / "x.json"]
    measured = CliRunner().invoke(evaluate_vae, [*map(str, [tmp_path / "x.onnx", *words, *more])])
    assert measured.exit_code == 0, measured.output
    (record,) = read(tmp_path / "x.json").records
    assert record["value"] == pytest.approx(found["distance"] * (1 + found["shift"]), rel=1e-3)
    assert record["value"] > 0
    strict = dataclasses.replace(limits, shift=0.0)
    with pytest.raises(LimitError, match="--limit-fd"):
        export(exportable, {"int8": tmp_path / "y.onnx"}, limits=strict)


def test_the_same_run_gives_the_same_bytes(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "smoke.onnx"
    assert command("export-onnx", smoke_run, "--out", out).returncode == 0
    assert load(out).digest == load(smoke_bundle).digest


def test_diff_says_how_far_apart(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    result = inside("export-onnx", "diff", smoke_bundle, smoke_bundle, "--count", 50)
    assert result.returncode == 0
    assert "byte for byte" in result.stdout
    other = tmp_path / "other.onnx"
    assert inside("export-onnx", smoke_run, "--out", other, "--normalise", "none").returncode == 0
    result = inside("export-onnx", "diff", smoke_bundle, other, "--count", 50, "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert found["worst"] > 1
    assert found["samples"] == 50
    assert_clear_error(inside("export-onnx", "diff", smoke_bundle, smoke_run / "config.json"), "not a model of ours")


def test_a_normalisations_card() -> None:
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    assert Normalisation("none", ones, zeros, 0).card() == {"mode": "none"}
    assert Normalisation("scalar", ones, zeros, 9).card() == {"mode": "scalar", "scale": 1.0, "draws": 9}


def test_a_card_has_room_for_the_newest_measurements_of_this_model(smoke_run: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    shutil.copytree(smoke_run, run)
    records = [{"metric": "FD", "set": "REC", "value": float(n), "reference": {"read": "x" * 500}} for n in range(100)]
    snapshots = [{**each, "epoch": 5} for each in records]
    (run / "metrics.json").write_text(json.dumps(records + snapshots))
    card = from_run(run, "measured", say=said.append).card
    assert 30 < len(card.metrics) < 100
    assert card.metrics == records[-len(card.metrics) :]
    assert said == [f"the card has room for the {len(card.metrics)} newest of 100 measurements; the run keeps all"]


def test_what_no_card_may_say_is_one_line_and_leaves_nothing(smoke_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    for option, value, words in (
        ("--notes", "red \x1b[31m", "notes must be"),
        ("--licence", "two\nlines", "licence must be one line"),
        ("--notes", "\u00e9" * 10_000 + "\u00e9" * 2000, "10000 characters"),
    ):
        assert_clear_error(inside("export-onnx", smoke_run, "--out", out, option, value), words)
    assert_clear_error(inside("export-onnx", smoke_run, "--out", out, "--name", "a/b"), "letters, digits", code=2)
    several = inside(
        "export-onnx", smoke_run, "--out", out, "--name", "x" * 64, "--precision", "fp32", "--precision", "int8"
    )
    assert_clear_error(several, "at most 64")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--limit-fd", "0.1"], "--limit-fd"),
        (["--limit-mean", "2"], "--limit-mean"),
        (["--count", "100"], "--count"),
        (["--features", "f.onnx", "--reference", "."], "--features"),
        (["--precision", "int8", "--limit-fd", "0.1"], "--limit-fd"),
        (["--prior", "normal", "--normalise", "scalar"], "--normalise"),
    ],
)
def test_an_option_without_effect_is_refused(words: list[str], option: str, smoke_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(smoke_run), "--out", str(tmp_path / "x.onnx"), *words])
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(f"Error: {option} ")
    assert not list(tmp_path.iterdir())


def test_a_prior_that_the_run_lacks_is_told_with_those_that_it_has(smoke_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(smoke_run), "--out", str(tmp_path / "x.onnx"), "--prior", "gmm"])
    assert result.exit_code == 1
    assert "has no prior gmm; pass --prior with one that it has: second-stage, normal" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_leaves_nothing(smoke_run: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    assert_clear_error(inside("export-onnx", tmp_path / "absent", "--out", out), "not a run directory", code=2)
    assert_clear_error(inside("export-onnx", tmp_path, "--out", out), "not a finished run")
    assert_clear_error(inside("export-onnx", smoke_run, "--out", smoke_bundle), "--force", code=2)
    assert_clear_error(inside("export-onnx", smoke_run, "--out", tmp_path / "no" / "x.onnx"), "make it first", code=2)

    broken = tmp_path / "broken"
    shutil.copytree(smoke_run, broken)
    (broken / "stage2.keras").unlink()
    assert_clear_error(inside("export-onnx", broken, "--out", out), "has no stage2.keras")
    (broken / "stage1.keras").write_bytes(b"cut")
    assert_clear_error(inside("export-onnx", broken, "--out", out), "stage1.keras")
    config = json.loads((broken / "config.json").read_text())
    config["recipe"]["new_setting"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    assert_clear_error(inside("export-onnx", broken, "--out", out), "another version", "new_setting")
    several = inside("export-onnx", smoke_bundle, "--out", out, "--precision", "int8", "--prior", "normal")
    assert_clear_error(several, "--prior is settled in a bundle", code=2)
    assert_clear_error(inside("export-onnx", smoke_run, "--out", out, "--features", out), "--reference", code=2)
    assert_clear_error(inside("export-onnx", broken / "config.json", "--out", out), "not a model of ours")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
