"""evaluate-vae: its figures against what they should be, its records, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from skimage import data

from tests.conftest import assert_clear_error, command
from training.errors import DataError
from training.evaluation import evaluator
from training.evaluation.cli import main
from training.evaluation.compare import read
from training.evaluation.distances import frechet, kid, precision_recall
from training.evaluation.extractors import OnnxExtractor
from training.evaluation.inception import Inception
from training.evaluation.latents import Tally
from training.evaluation.reference import Reference, statistics
from training.evaluation.statistics import Moments, Statistics, collect
from training.model.normalise import MODES

SIDE = 16
RNG = np.random.default_rng(0)


def save(path: Path, nodes: list[onnx.NodeProto], taken: onnx.ValueInfoProto, given: onnx.ValueInfoProto) -> Path:
    constants = {
        "weights": RNG.standard_normal((8, 3, 4, 4)).astype(np.float32),
        "peak": np.float32(255),
        "few": np.int64([3]),
    }
    initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "features", [taken], [given], initialisers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def images(channels: object = 3, kind: int = TensorProto.UINT8, side: object = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("images", kind, ["n", side or "h", side or "w", channels])


def layers(*last: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Eight filters of 4x4, rectified, and their mean over the picture."""
    return [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "peak"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weights"], ["filtered"], strides=[2, 2]),
        helper.make_node("Relu", ["filtered"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        *last,
    ]


FLAT = helper.make_node("Flatten", ["pooled"], ["features"])
FEATURES = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 8])


@pytest.fixture(scope="module")
def extractor_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("extractors") / "tiny.onnx", layers(FLAT), images(), FEATURES)


@pytest.fixture(scope="module")
def extractor(extractor_file: Path) -> OnnxExtractor:
    return OnnxExtractor(extractor_file, SIDE)


def patches(picture: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Squares out of a photograph, uint8 [count, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, np.array(picture.shape[:2]) - SIDE, (count, 2))
    return np.stack([picture[y : y + SIDE, x : x + SIDE] for y, x in corners])


def batches(pictures: np.ndarray, size: int = 32) -> list[np.ndarray]:
    return [pictures[at : at + size] for at in range(0, len(pictures), size)]


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def assert_refused(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    for word in words:
        assert word in last


# Distances.


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(2, mean, covariance, np.empty((0, len(mean)), np.float32))


@given(size=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_frechet_distance_of_gaussians_with_common_axes(size: int, seed: int) -> None:
    """There it is |ma - mb|^2 + sum (sa - sb)^2, whichever way the axes point."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((size, size)))[0]
    ma, mb = rng.standard_normal((2, size))
    sa, sb = np.abs(rng.standard_normal((2, size)))
    a, b = (gaussian(mean, axes @ np.diag(sd**2) @ axes.T) for mean, sd in ((ma, sa), (mb, sb)))
    wanted = np.sum((ma - mb) ** 2) + np.sum((sa - sb) ** 2)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6, abs=1e-6)


def test_a_set_is_no_distance_from_itself_and_some_from_another(extractor: OnnxExtractor) -> None:
    cat, rocket = (collect(extractor, batches(patches(picture, 200))) for picture in (data.chelsea(), data.rocket()))
    assert frechet(cat, cat) == pytest.approx(0, abs=1e-6)
    assert frechet(cat, rocket) > 0.1


@given(rows=st.integers(2, 60), cuts=st.lists(st.integers(1, 59), max_size=5), offset=st.floats(-1e3, 1e3))
@settings(max_examples=50, deadline=None)
def test_streamed_moments_are_those_of_all(rows: int, cuts: list[int], offset: float) -> None:
    values = (np.random.default_rng(rows).standard_normal((rows, 3)) + offset).astype(np.float32)
    moments = Moments(3)
    for part in np.split(values, sorted({cut for cut in cuts if cut < rows})):
        moments.add(part)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def test_kid_tells_a_shift_from_chance() -> None:
    real, same = np.random.default_rng(1).standard_normal((2, 400, 16)).astype(np.float32)
    mean, deviation = kid(real, same, seed=0)
    assert abs(mean) < 2 * deviation
    shifted, _ = kid(real, same + np.float32(0.3), seed=0)
    assert shifted > mean + 5 * deviation
    assert kid(real[:50], same[:50], seed=0) == kid(real[:50], same[:50], seed=0)


def test_kid_is_unbiased() -> None:
    """Against the mean of the kernel over all pairs of a finite set, which is its own population."""
    x, y = np.random.default_rng(2).standard_normal((2, 400, 4)).astype(np.float32)
    y = y * np.float32(1.5)
    inner = sum(((a @ a.T / 4 + 1) ** 3)[~np.eye(400, dtype=bool)].mean() for a in (x, y))
    mean, deviation = kid(x, y, seed=0)
    assert mean == pytest.approx(inner - 2 * ((x @ y.T / 4 + 1) ** 3).mean(), abs=deviation / 2)


def test_precision_and_recall() -> None:
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((2, 100, 5)).astype(np.float32)
    right += 50
    both = np.concatenate([left, right])
    assert precision_recall(both, both) == (1, 1)
    precision, recall = precision_recall(both, left)  # half of what is real is never made
    assert precision == 1
    assert recall == pytest.approx(0.5)
    assert precision_recall(left, both) == (recall, precision)
    assert precision_recall(left, right) == (0, 0)


# Latents.


def test_both_definitions_of_an_inactive_latent() -> None:
    """A deviation of .85 is a variance of .72: inactive by the authors' code, active by the paper."""
    mean = np.float32([[1, 0, 0], [-1, 0, 0]])
    sd = np.tile(np.float32([0.1, 0.85, 0.95]), (2, 1))
    tally = Tally()
    black = np.zeros((2, 4, 4, 3), np.float32)
    for row in range(2):
        tally.add(mean[row : row + 1], sd[row : row + 1], black[:1], black[:1] + np.float32(0.5))
    known = tally.summary()
    assert known["mse"] == pytest.approx(0.25)
    assert (known["inactive"], known["inactive_authors"]) == (1, 2)
    assert known["variance_law"] == pytest.approx((1 + 0.01 + 0.85**2 + 0.95**2) / 3)
    assert known["variance_law_authors"] == pytest.approx((1 + 0.1 + 0.85 + 0.95) / 3)
    assert [latent["active"] for latent in known["per_latent"]] == [True, True, False]


def test_a_deterministic_first_stage_has_no_inactive_latents(extractor: OnnxExtractor) -> None:
    import keras

    from training.evaluation.report import latents
    from training.evaluation.sampling import FirstStage

    x, z = keras.Input((SIDE, SIDE, 3)), keras.Input((4,))
    code = keras.layers.Dense(4)(keras.layers.Flatten()(x))
    encoder = keras.Model(x, [code], name="encoder")
    picture = keras.layers.Dense(SIDE * SIDE * 3, activation="sigmoid")(z)
    decoder = keras.Model(z, keras.layers.Reshape((SIDE, SIDE, 3))(picture), name="decoder")
    whole = keras.Input((SIDE, SIDE, 3))
    networks = keras.Model(whole, decoder(encoder(whole)))
    tally = Tally()
    made = list(FirstStage(networks).reconstruct(batches(patches(data.chelsea(), 40)), tally))
    assert [(part.dtype, part.shape) for part in made] == [
        (np.uint8, (32, SIDE, SIDE, 3)),
        (np.uint8, (8, SIDE, SIDE, 3)),
    ]
    known = tally.summary()
    assert "inactive" not in known
    assert "variance_law" not in known
    assert len(known["per_latent"]) == 4
    assert "deterministic" in latents({**known, "count": 40})


# The reference and its cache.


def reference(count: int = 60) -> Reference:
    return Reference(patches(data.chelsea(), 90), np.arange(count) * 90 // count, {"data": "cat"})


def test_the_cache_gives_the_same_and_spares_the_extraction(extractor: OnnxExtractor, tmp_path: Path) -> None:
    fresh = statistics(reference(), extractor, tmp_path, 32, lambda batches: batches)

    def fail(_: object) -> Any:
        pytest.fail("extracted again")

    cached = statistics(reference(), extractor, tmp_path, 32, fail)
    for one, two in zip(vars(fresh).values(), vars(cached).values(), strict=True):
        assert np.array_equal(one, two)
    assert statistics(reference(50), extractor, tmp_path, 32, lambda batches: batches).count == 50
    assert len(list((tmp_path / "reference").iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_cache_is_made_again(damage: bytes | None, extractor: OnnxExtractor, tmp_path: Path) -> None:
    fresh = statistics(reference(), extractor, tmp_path, 32, lambda batches: batches)
    (file,) = (tmp_path / "reference").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + bytes(8) + whole[len(whole) // 2 + 8 :] if damage is None else damage)
    again = statistics(reference(), extractor, tmp_path, 32, lambda batches: batches)
    assert np.array_equal(fresh.covariance, again.covariance)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(extractor: OnnxExtractor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache"):
        statistics(reference(), extractor, tmp_path / "file", 32, lambda batches: batches)


# Extractors.


def test_grey_pictures_are_repeated(extractor: OnnxExtractor) -> None:
    grey = patches(data.chelsea(), 5)[..., :1]
    assert np.array_equal(extractor(grey), extractor(np.repeat(grey, 3, axis=-1)))


WRONG = {
    "rank": (layers(), images(), helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["n", 8, 1, 1])),
    "kind": (
        layers(FLAT, helper.make_node("Cast", ["features"], ["whole"], to=TensorProto.INT64)),
        images(),
        helper.make_tensor_value_info("whole", TensorProto.INT64, ["n", 8]),
    ),
    "floats": (layers(FLAT), images(kind=TensorProto.FLOAT), FEATURES),
    "grey": (layers(FLAT), images(channels=1), FEATURES),
    "side": (layers(FLAT), images(side=224), FEATURES),
    "sum": (
        layers(helper.make_node("ReduceSum", ["pooled"], ["features"], keepdims=0)),
        images(),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, None),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_models_that_are_no_extractors(wrong: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"{wrong}.onnx", *WRONG[wrong])
    with pytest.raises(DataError, match=r"Received: |not an ONNX model that runs") as error:
        OnnxExtractor(path, SIDE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(DataError, match="not an ONNX model"):
        OnnxExtractor(tmp_path / "text.onnx", SIDE)
    with pytest.raises(DataError, match="No such file"):
        OnnxExtractor(tmp_path / "none.onnx", SIDE)


# The Inception graph.


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up graph with the real one's nodes: pictures in at ExpandDims, fed at Mul, out at pool_3."""
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        decoded = tf.compat.v1.placeholder(tf.float32, [1, 20, 20, 3], "ExpandDims")
        resized = tf.compat.v1.image.resize_bilinear(decoded, [299, 299], name="ResizeBilinear")
        fed = tf.multiply(resized - 128.0, 1 / 128, name="Mul")
        pooled = tf.nn.avg_pool2d(fed, 74, 75, "VALID")  # 4x4 regions
        flat = tf.reshape(pooled, [-1, 1, 1, 48])
        weights = np.random.default_rng(0).standard_normal((1, 1, 48, 8)).astype(np.float32)
        tf.nn.relu(tf.nn.conv2d(flat, weights, 1, "VALID"), name="pool_3")
    path = tmp_path_factory.mktemp("inception") / "classify_image_graph_def.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


def test_inception_sees_pictures_as_tensorflow_1_resized_them(inception_file: Path) -> None:
    """Pixel (0, 0) stays where it is, and the right and lower edges are repeated: not how Pillow resizes."""
    extractor = Inception(inception_file, SIDE)
    assert (extractor.metric, extractor.size) == ("FID", 8)
    picture = patches(data.chelsea(), 3)
    position = np.arange(299) * SIDE / 299
    low = position.astype(int)
    high, share = np.minimum(low + 1, SIDE - 1), position - low
    values = picture.astype(np.float64)
    rows = values[:, low] * (1 - share)[:, None, None] + values[:, high] * share[:, None, None]
    resized = rows[:, :, low] * (1 - share)[:, None] + rows[:, :, high] * share[:, None]
    fed = (resized - 128) / 128
    regions = [fed[:, y : y + 74, x : x + 74].mean(axis=(1, 2)) for y in range(0, 299, 75) for x in range(0, 299, 75)]
    weights = np.random.default_rng(0).standard_normal((1, 1, 48, 8)).astype(np.float32)
    wanted = np.maximum(np.concatenate(regions, axis=1) @ weights[0, 0], 0)
    np.testing.assert_allclose(extractor(picture), wanted, atol=1e-3)


def test_other_graphs_are_not_inception(tmp_path: Path, extractor_file: Path) -> None:
    import tensorflow as tf

    with pytest.raises(DataError, match="not the Inception graph"):
        Inception(extractor_file, SIDE)
    with tf.Graph().as_default() as graph:
        fed = tf.compat.v1.placeholder(tf.float32, [None, 299, 299, 3], "Mul")
        tf.reduce_mean(fed, [1, 2], name="pool_3")
    (tmp_path / "flat.pb").write_bytes(graph.as_graph_def().SerializeToString())
    with pytest.raises(DataError, match=r"Received: \[2, 3\]"):
        Inception(tmp_path / "flat.pb", SIDE)
    with pytest.raises(DataError, match=r"inception-2015-12-05\.tgz"):
        Inception(tmp_path / "none.pb", SIDE)


# The command.


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


KEEPER = """
import sys
from pathlib import Path
from training.evaluation.measure import keep
from training.record.run import Run

run, seed, records = Run(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for count in range(records):
    keep(run, {"metric": "FD (tiny)", "count": count, "seed": seed})
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
        _, said = each.communicate(timeout=300)
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
