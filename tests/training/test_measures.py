"""Distances, statistics, extractors and their cache: each figure against what it should be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from skimage import data

from tests.training.conftest import FEATURES, FLAT, SIDE, images, layers, save
from training.data.dataset import load_data
from training.errors import DataError
from training.evaluation.copying import Closest, Copying, Pair, _Space, all_thumbnails, thumbnails
from training.evaluation.distances import frechet, kid, precision_recall
from training.evaluation.extractors import OnnxExtractor
from training.evaluation.inception import Inception
from training.evaluation.latents import Tally
from training.evaluation.reference import Reference, held_back, statistics
from training.evaluation.statistics import Moments, Statistics, collect
from training.recipes import RECIPES


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


def test_copies_are_told_from_new_pictures(extractor: OnnxExtractor) -> None:
    def features(pictures: np.ndarray) -> np.ndarray:
        return collect(extractor, batches(pictures)).features

    seen, unseen, new = (patches(data.chelsea(), count, seed) for seed, count in enumerate((200, 300, 400)))
    others = (features(unseen), thumbnails(unseen), {"data": "cat"})
    copying = Copying(features(seen), thumbnails(seen), *others)

    def shares(pictures: np.ndarray) -> list[float]:
        record = copying(features(pictures), thumbnails(pictures))
        for key in ("copying_deviation", "copying_pixels_deviation"):
            assert 0 <= record[key] < 0.03
        return [record["copying"], record["copying_pixels"]]

    assert shares(seen) == pytest.approx([1, 1], abs=0.02)  # some of the unseen are the same patches
    assert copying(features(seen), thumbnails(seen))["copying_distances"]["pixels"]["set"] == pytest.approx(0, abs=1e-2)
    assert shares(unseen) == pytest.approx([0.5, 0.5])
    assert shares(new) == pytest.approx([0.5, 0.5], abs=0.1)
    assert shares(np.concatenate([seen, new[:200]])) == pytest.approx([0.75, 0.75], abs=0.1)
    noise = np.random.default_rng(0).integers(0, 256, new.shape, np.uint8)
    assert max(shares(noise)) < 0.1
    # Mirror images are copies where they were trained on.
    mirrored = seen[:, :, ::-1]
    assert shares(mirrored)[1] < 0.9
    both = np.concatenate([seen, mirrored])
    copying = Copying(features(both), thumbnails(both), *others)
    assert shares(mirrored) == pytest.approx([1, 1], abs=0.02)


def test_the_deviation_is_that_over_draws() -> None:
    """Of the pictures of a set, and of those that were held back."""
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((200, 4)).astype(np.float32)
    found = []
    for _ in range(300):
        space = _Space(seen, rng.standard_normal((30, 4)).astype(np.float32))
        found.append(space(1.2 * rng.standard_normal((80, 4)).astype(np.float32)))
    assert np.std([each["share"] for each in found]) == pytest.approx(
        np.mean([each["deviation"] for each in found]), rel=0.15
    )


def test_what_was_held_back_is_validation_or_else_test(tmp_path: Path) -> None:
    pictures = patches(data.chelsea(), 90)
    for tests, found in ((10, "test"), (9, None)):
        file = tmp_path / f"{tests}.npz"
        np.savez(file, x_train=pictures[:40], x_test=pictures[40 : 40 + tests])
        recipe = RECIPES["smoke"]()
        splits = load_data(file, recipe, cache=tmp_path)
        unseen, why_not = held_back(splits, "train", recipe, splits.train.digest)
        assert (unseen and unseen.card["split"]) == found
        assert bool(why_not) == (found is None)
        assert held_back(splits, "train", recipe, "")[1] == "--data holds other pictures than training saw"
    splits = load_data(file, recipe.set(["validation=0.4"]), cache=tmp_path)
    unseen, _ = held_back(splits, "train", recipe, splits.train.digest)
    assert unseen
    assert (unseen.card["split"], unseen.card["count"]) == ("validation", len(splits.validation or ()))


def test_what_is_closest_is_drawn_beside_its_picture(tmp_path: Path) -> None:
    """Three copies among new pictures come first, whichever batch they are in."""
    seen, new = patches(data.chelsea(), 100, 0), patches(data.astronaut(), 90, 1)
    known = Reference(seen, np.arange(0, 100, 2), {"data": "cat"})
    parts = [known, known.mirror()]
    closest = Closest(parts, all_thumbnails(parts, 32))
    shown = np.concatenate([new[:40], seen[[10]], new[40:], seen[[20]], seen[[30]][:, :, ::-1], seen[[31]]])
    pairs: list[Pair] = []
    for some in batches(shown, 20):
        pairs = closest.best(pairs, some, thumbnails(some))
    assert len(pairs) == 32
    assert sorted(index for _, _, index in pairs[:3]) == [5, 10, 50 + 15]
    closest.draw(tmp_path / "sheet.png", pairs)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    shown_first = [sheet[2 : 2 + SIDE, 2 + at * (2 * SIDE + 2) :][:, : 2 * SIDE] for at in range(4)]
    assert [np.array_equal(pair[:, :SIDE], pair[:, SIDE:]) for pair in shown_first] == [True, True, True, False]


@given(side=st.integers(1, 70), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_thumbnails_are_averages(side: int, channels: int, seed: int) -> None:
    pictures = np.random.default_rng(seed).integers(0, 256, (2, side, side, channels), np.uint8)
    small = thumbnails(pictures)
    size = min(side, 16)
    assert small.shape == (2, size * size * channels)
    assert small.mean(axis=1) == pytest.approx(pictures.mean(axis=(1, 2, 3)) / 255, rel=1e-4)
    if side % size == 0:
        blocks = pictures.reshape(2, size, side // size, size, side // size, channels).mean(axis=(2, 4)) / 255
        assert small == pytest.approx(blocks.reshape(2, -1), abs=1e-5)


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
