"""Sharpening: a decoder trained on against a critic, and nothing else of the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import pytest

from export.exportable import from_run
from serve.noise import draw
from tests.conftest import BIN, assert_clear_error, command, inside
from training import train
from training.fit.stop import Stopped, StopRequest
from training.model.autoencoder import xla
from training.model.build import image_decoder, sharpener
from training.model.normalise import Normalisation
from training.recipe import Recipe
from training.recipes import recipe
from training.record.run import Run

SHARP = ("--set", "epochs3=2", "--set", "critic_dim=4", "--set", "averaging=.5", "--set", "lr3=.01")


def weights(path: Path) -> list[np.ndarray]:
    return list(keras.models.load_model(path, compile=False).get_weights())


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def words(pictures: Path) -> list[object]:
    return ["train-vae", "--recipe", "smoke", "--data", pictures, *SHARP, "--out"]


@pytest.fixture(scope="module")
def sharp(smoke_run: Path, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was sharpened later."""
    out = tmp_path_factory.mktemp("sharpened") / "run"
    shutil.copytree(smoke_run, out)
    result = command(*words, out)
    assert result.returncode == 0, result.stderr
    assert "stage 3 epoch 2/2" in result.stderr
    return out


def test_all_but_the_decoder_stays(sharp: Path, smoke_run: Path) -> None:
    for name in ("stage1.keras", "stage2.keras"):
        assert same(weights(smoke_run / name), weights(sharp / name))
    records = [json.loads(line) for line in (sharp / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["stage"] == 3] == [1, 2]
    assert {"mse", "matching", "adversarial", "critic", "lr"} <= records[-1].keys()
    sheets = [(sharp / "samples" / f"{name}.png").read_bytes() for name in ("second-stage", "sharpened", "stage3-0002")]
    assert len(set(sheets)) == 3
    before = Run(sharp).load_networks(1).get_layer("decoder")
    after = Run(sharp).decoder()
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    assert not same(before.get_weights(), after.get_weights())
    assert same(before.get_weights(), Run(sharp).decoder(plain=True).get_weights())


@pytest.mark.slow
def test_stopped_in_the_middle_it_is_the_same(
    sharp: Path, smoke_run: Path, words: list[object], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(smoke_run, cut)
    name, *rest = map(str, (*words, cut, "--save-every", 0))
    with subprocess.Popen([BIN / name, *rest], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "stage 3 epoch 1/2" in line)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert not (cut / "sharpened.keras").exists()
    assert_clear_error(inside(*words, cut, "--set", "critic_dim=8"), "critic_dim is 4 there and 8 here")
    result = command(*words, cut)
    assert "going on in epoch" in result.stderr
    assert same(weights(sharp / "sharpened.keras"), weights(cut / "sharpened.keras"))


@pytest.mark.slow
def test_more_epochs_go_on_and_another_prior_begins_anew(
    sharp: Path, words: list[object], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharp, out)
    result = inside(*words, out, "--set", "epochs3=3")
    assert "going on in epoch 3/3 of stage 3" in result.stderr
    assert not same(weights(sharp / "sharpened.keras"), weights(out / "sharpened.keras"))
    result = inside(*words, out, "--set", "epochs3=3", "--set", "epochs2=3")
    assert "stage 3 epoch 1/3" in result.stderr


def test_it_is_what_is_exported_and_measured_unless_plain_is_wanted(
    sharp: Path, smoke_run: Path, smoke_bundle: Path, pictures: Path, extractor_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sharp, run)
    measuring = ("--data", pictures, "--features", extractor_file, "--count", 48, "--no-kid", "--no-precision-recall")
    for words, label in (((), "REC, sharpened"), (("--plain",), "REC ")):
        result = inside("evaluate-vae", run, *measuring, *words)
        assert f"| {label}" in result.stdout, result.stderr
    kinds = [record.get("decoder") for record in Run(run).metrics if record.get("set") == "REC"]
    assert kinds == ["sharpened", None]

    sharpened, plain = (from_run(run, "faces", plain=each) for each in (False, True))
    assert (sharpened.card.recipe["epochs3"], plain.card.recipe["epochs3"]) == (2, 0)
    assert {"sharpened"} == {each.get("decoder") for each in sharpened.card.metrics if "set" in each}
    assert not any("decoder" in each for each in plain.card.metrics)
    noise = draw(0, 0, 4, 8)
    made = [each.reference(noise) for each in (sharpened, plain, from_run(smoke_run, "faces"))]
    assert not np.array_equal(made[0], made[1])
    assert np.array_equal(made[1], made[2])
    refused = inside("export-onnx", smoke_bundle, "--plain", "--out", tmp_path / "x.onnx")
    assert_clear_error(refused, "--plain is settled in a bundle", code=2)


def test_it_never_stands_for_what_is_not_sharpened_yet(
    sharp: Path, words: list[object], pictures: Path, tmp_path: Path
) -> None:
    """While it goes on, or was trained on another prior's samples, there is nothing to export or to measure."""
    out = tmp_path / "run"
    shutil.copytree(sharp, out)
    (out / "metrics.json").write_text(json.dumps([{"set": "REC", "decoder": "sharpened"}, {"set": "REC"}]))
    (out / "state" / "stage3.npz").rename(tmp_path / "kept")
    assert_clear_error(inside(*words, out, "--set", "lr3=1"), "lr3 is 0.01 there and 1.0 here, and cannot change")
    assert_clear_error(inside(*words, out, "--set", "epochs3=3"), "stage3.npz is gone, which more epochs take")
    (tmp_path / "kept").rename(out / "state" / "stage3.npz")
    before = (out / "sharpened.keras").read_bytes()
    stopped = StopRequest()
    stopped.signal = signal.SIGTERM
    chosen = Run(out).recipe.set(["epochs3=3"])
    with pytest.raises(Stopped):
        train(chosen, pictures, out, stop=stopped)
    assert not (out / "sharpened.keras").exists()
    assert Run(out).metrics == [{"set": "REC"}]
    refused = inside("export-onnx", out, "--out", tmp_path / "x.onnx")
    assert_clear_error(refused, "is not a finished run: it has no sharpened.keras")
    (out / "sharpened.keras").write_bytes(before)
    with Run(out).open(chosen.set(["priors=second-stage,gmm"]), Run(out).config["data"]):
        assert (out / "sharpened.keras").exists()  # the default prior is the same
    with Run(out).open(replace(chosen, priors=("gmm",)), Run(out).config["data"]):
        assert (out / "sharpened.keras").exists()  # what a run has, it keeps


def test_settings_of_sharpening_count_with_it_alone(pictures: Path, tmp_path: Path) -> None:
    result = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--set", "lr3=1", "--out", tmp_path / "run")
    assert_clear_error(result, "lr3 changes nothing in this recipe: it counts with epochs3 above 0", code=2)


def test_critic_and_decoder_learn_from_their_own_terms_alone() -> None:
    """With the decoder held, the critic comes to tell what it makes from pictures; the decoder's terms do not matter.

    With the critic held, its verdict on what the decoder makes rises.
    """
    made = small("mixed_bfloat16")
    rng = np.random.default_rng(0)
    stripes = np.broadcast_to(np.arange(16)[:, None, None] % 4 * 80, (64, 16, 16, 3))
    real = (stripes + rng.integers(0, 15, (64, 16, 16, 3))).astype(np.uint8)

    def fitted(epochs: int) -> dict[str, list[float]]:
        made.compile(optimizer=keras.optimizers.Adam(0.005, beta_1=0.5), jit_compile=xla())
        history: dict[str, list[float]] = made.fit(real, batch_size=16, epochs=epochs, shuffle=False, verbose=0).history
        return history

    made.decoder.trainable = False
    decoder = made.decoder.get_weights()
    critic = fitted(8)["critic"]
    assert same(decoder, made.decoder.get_weights())
    assert critic[-1] < 0.7 * critic[0]

    made.decoder.trainable, made.critic.trainable = True, False
    kernels = [each for each in made.critic.weights if each.name == "kernel"]
    before = [np.array(each) for each in kernels]
    adversarial = fitted(8)["adversarial"]
    assert adversarial[-1] < adversarial[0] - 0.3
    assert same(before, [np.array(each) for each in kernels])


def test_what_is_kept_is_the_average() -> None:
    made = small("float32", averaging=0.9)
    start = [np.array(each) for each in made.decoder.trainable_variables]
    for each in made.decoder.trainable_variables:
        each.assign(each + 1)
    for _ in range(2):
        made.average.update()
    decoder = image_decoder(RECIPE)
    made.keep(decoder)
    for before, kept in zip(start, decoder.trainable_variables, strict=True):
        assert np.allclose(np.array(kept), before + 1 - 0.1 * 2 / 11, atol=1e-5)


RECIPE = recipe("smoke").set(["epochs3=1", "critic_dim=4"])


def small(precision: str, averaging: float = 0.9) -> keras.Model:
    """Return what sharpens an untrained stage 1, on samples of the standard normal."""
    from training.model.build import image_autoencoder, plain_images

    chosen: Recipe = RECIPE.set([f"precision={precision}", f"averaging={averaging}", "feature_matching=0"])
    chosen = chosen.set(["pixel_matching=0"])
    first = plain_images(image_autoencoder(chosen), chosen)
    size = chosen.latent_dim
    noise = keras.Input((size,))
    unchanged = Normalisation("none", np.ones(size, np.float32), np.zeros(size, np.float32), 0)
    return sharpener(chosen, first, keras.Model(noise, noise), unchanged, 0.05)
