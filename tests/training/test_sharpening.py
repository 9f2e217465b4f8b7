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
from training.errors import RunError
from training.fit.stop import Stopped, StopRequest
from training.model.autoencoder import xla
from training.model.build import image_decoder, sharpener
from training.model.normalise import Normalisation
from training.model.sharpen import _Change
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
    assert_clear_error(
        inside(*words, out, "--set", "lr3=1"),
        "lr3 is 0.01 there and 1.0 here, and cannot change",
        "or delete sharpened.keras and state/stage3.npz there to sharpen anew",
    )
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
    assert_clear_error(refused, "is not sharpened yet; run train-vae to its end, or take", "by --plain")
    (out / "sharpened.keras").write_bytes(before)
    with Run(out).open(chosen.set(["priors=second-stage,gmm"]), Run(out).config["data"]):
        assert (out / "sharpened.keras").exists()  # the default prior is the same
    with Run(out).open(replace(chosen, priors=("gmm",)), Run(out).config["data"]):
        assert (out / "sharpened.keras").exists()  # what a run has, it keeps


def test_until_it_is_finished_it_can_begin_anew_or_be_given_up(sharp: Path, tmp_path: Path) -> None:
    """With other settings, on samples of another prior, or without what was kept: nothing of before passes for it."""
    stale = [{"set": "REC", "decoder": "sharpened"}, {"set": "REC"}]
    recipe, data = Run(sharp).recipe, Run(sharp).config["data"]

    def opened(name: str, wanted: Recipe, finished: bool = False) -> tuple[bool, list[int], int]:
        """Open a copy; return whether stage 3 goes on, and its epochs and measurements that are left."""
        out = tmp_path / name
        shutil.copytree(sharp, out)
        (out / "metrics.json").write_text(json.dumps(stale))
        if not finished:
            (out / "sharpened.keras").unlink()
        run = Run(out)
        with run.open(wanted, data) as agreed:
            assert agreed.epochs3 == wanted.epochs3
        epochs = [each["epoch"] for each in run.history() if each["stage"] == 3]
        return (out / "state" / "stage3.npz").exists(), epochs, len(run.metrics) - 1

    assert opened("same", recipe) == (True, [1, 2], 0)
    assert opened("more", recipe.set(["epochs3=3"])) == (True, [1, 2], 0)
    assert opened("finished", recipe, finished=True) == (True, [1, 2], 1)
    for name, setting in (("rate", "lr3=.001"), ("fewer", "epochs3=1"), ("critic", "critic_dim=8")):
        assert opened(name, recipe.set([setting])) == (False, [], 0)
    given_up = replace(recipe, epochs3=0)
    assert opened("none", given_up) == (False, [], 0)
    assert Run(tmp_path / "none").decoder().name == "decoder"
    with pytest.raises(RunError, match="epochs3 is 2 there and 0 here, and cannot change to fewer"):
        opened("kept", given_up, finished=True)


def test_another_default_prior_has_it_begin_anew(sharp: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(sharp, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"recipe": config["recipe"] | {"priors": []}}))
    (out / "stage2.keras").unlink()
    run = Run(out)
    with run.open(run.recipe, config["data"]):  # of the standard normal alone
        assert run.sharpened
    with run.open(replace(run.recipe, priors=("second-stage",)), config["data"]):
        assert not run.sharpened


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
    critic = fitted(8)["critic"]
    assert critic[-1] < 0.7 * critic[0]

    made.decoder.trainable, made.critic.trainable = True, False
    adversarial = fitted(8)["adversarial"]
    assert adversarial[-1] < adversarial[0] - 0.3


def test_no_gradient_of_one_reaches_the_other() -> None:
    import tensorflow as tf

    made = small("float32")
    pictures = np.random.default_rng(0).uniform(0, 1, (8, 16, 16, 3)).astype(np.float32)
    with tf.GradientTape(persistent=True) as tape:
        outputs = made(pictures * made.input_scale, training=True)
        _, (mse, matching, adversarial, critic) = made.loss_and_terms(pictures, outputs, True)
    decoders, critics = ([each.value for each in of.trainable_variables] for of in (made.decoder, made.critic))
    for term in (mse, matching, adversarial):
        assert not any(each is not None and np.any(each) for each in tape.gradient(term, critics))
        assert any(each is not None and np.any(each) for each in tape.gradient(term, decoders))
    assert not any(each is not None and np.any(each) for each in tape.gradient(critic, decoders))
    assert any(each is not None and np.any(each) for each in tape.gradient(critic, critics))


def test_a_picture_and_what_became_of_it_are_changed_alike() -> None:
    pictures = np.random.default_rng(0).uniform(0, 1, (8, 16, 16, 3)).astype(np.float32)
    change = _Change(pictures, keras.random.SeedGenerator(0))
    once, again = (np.array(change(each)) for each in (pictures, pictures.copy()))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, pictures)


def test_samples_are_the_priors_with_the_latents_variance() -> None:
    size = RECIPE.latent_dim
    noise = keras.Input((size,))
    ones = keras.Model(noise, keras.ops.ones_like(noise))
    twice = Normalisation("scalar", np.full(size, 2, np.float32), np.full(size, 1, np.float32), 0)
    made = small("float32", prior=ones, normalisation=twice)
    _, drawn = made(np.zeros((4, 16, 16, 3), np.uint8))
    expected = made.decoder(np.full((4, size), 3, np.float32))
    assert np.allclose(drawn, expected, atol=1e-6)


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


def small(
    precision: str,
    averaging: float = 0.9,
    prior: keras.Model | None = None,
    normalisation: Normalisation | None = None,
) -> keras.Model:
    """Return what sharpens an untrained stage 1, on samples of the standard normal if of no other."""
    from training.model.build import image_autoencoder, plain_images

    chosen: Recipe = RECIPE.set([f"precision={precision}", f"averaging={averaging}", "feature_matching=0"])
    chosen = chosen.set(["pixel_matching=0"])
    first = plain_images(image_autoencoder(chosen), chosen)
    size = chosen.latent_dim
    noise = keras.Input((size,))
    unchanged = Normalisation("none", np.ones(size, np.float32), np.zeros(size, np.float32), 0)
    return sharpener(chosen, first, prior or keras.Model(noise, noise), normalisation or unchanged, 0.05)
