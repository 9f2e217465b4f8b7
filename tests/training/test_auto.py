"""The recipe `auto`: what is looked at, what is decided, what is said, and what a plan leaves for the same command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests.conftest import assert_clear_error, draw_faces, inside, last_line
from training.data.survey import FEWEST, Survey, survey
from training.fit.batches import order
from training.fit.plan import fitted, plan
from training.recipe import Recipe
from training.record.stage import Schedule
from training.settings import page

TINY = [word for each in ("side=16", "fc_dim=8", "second_dim=8", "second_depth=1") for word in ("--set", each)]
SHORT = [word for each in ("epochs=2", "epoch_steps=3", "epochs2=2", "epoch_steps2=3") for word in ("--set", each)]


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """Time so few steps that a plan is made at once: nothing here asks for good times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.fit.plan.TIMED", 0.1)
        yield


def digits(folder: Path, count: int) -> Path:
    """Grey pictures of numbers, which are no numbers any more when they are mirrored."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        picture = Image.new("L", (28, 28), 0)
        place = rng.integers(0, 6, 2).tolist()
        ImageDraw.Draw(picture).text(place, str(rng.choice([2, 3, 4, 5, 6, 7, 9])), fill=255, font_size=22)
        picture.save(folder / f"{index}.png")
    return folder


def test_pictures_are_looked_at(pictures: Path, tmp_path: Path) -> None:
    assert survey(pictures, cache=tmp_path / "c") == Survey(48, 40, grey=False, mirrors=True)
    assert survey(digits(tmp_path / "digits", 200), cache=tmp_path / "c") == Survey(200, 28, grey=True, mirrors=False)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (64, 50, 100, 3), np.uint8))
    assert survey(tmp_path / "x.npy", cache=tmp_path / "c") == Survey(64, 50, grey=False, mirrors=True)


@given(minutes=st.floats(1, 600), seconds=st.floats(0.001, 5), count=st.integers(16, 300_000))
@settings(deadline=None)
def test_more_time_makes_wider_networks_of_pictures_as_large(minutes: float, seconds: float, count: int) -> None:
    drafted = Recipe(side=64, num_scale=4, base_dim=8)
    less, more = (fitted(drafted, seconds, 60 * each, count, ()) for each in (minutes, 2 * minutes))
    assert (less.side, less.base_dim) <= (more.side, more.base_dim)
    assert less.side in (32, 64)
    assert fitted(drafted, seconds, 60 * minutes, count, ("side",)).side == 64
    assert fitted(drafted, seconds, 60 * minutes, count, ("base_dim",)) == drafted


def test_few_pictures_are_not_learned_by_heart_for_hours() -> None:
    decided = plan(Survey(64, 28, grey=True, mirrors=False), 600, ("base_dim=4", "fc_dim=8", "priors="))
    assert (decided.recipe.side, decided.recipe.channels, decided.recipe.flip) == (32, 1, False)
    steps = decided.recipe.epochs * decided.recipe.epoch_steps
    assert 1000 < steps <= 2000
    assert f"{steps:,} steps of 32 pictures" in str(decided)


def test_what_is_set_is_not_decided() -> None:
    faces = Survey(700, 178, grey=False, mirrors=True)
    given = ("side=16", "base_dim=4", "flip=false", "batch=7", "epochs=3", "epoch_steps=5", "lr=0.5", "limit=50")
    recipe = plan(faces, 1, (*given, "fc_dim=8", "second_dim=8", "halve_every2=9")).recipe
    assert recipe == recipe.set((*given, "halve_every2=9"))
    assert recipe.halve_every == 1
    assert recipe.balance_momentum == 0.95  # of 15 steps, however many there is time for


def test_too_few_pictures_is_a_line_that_says_what_is_missing(tmp_path: Path) -> None:
    draw_faces(tmp_path / "few", 3)
    result = inside("train-vae", "--data", tmp_path / "few", "--out", tmp_path / "run", "--minutes", 1)
    assert_clear_error(result, f"{FEWEST} pictures or more", "Received: 3")
    assert "timing" not in result.stderr  # nothing is done first
    assert not (tmp_path / "run").exists()


def test_machines_that_train_together_do_not_decide_each_for_itself(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["localhost:1", "localhost:2"]}}))
    result = inside("train-vae", "--data", pictures, "--out", tmp_path / "run")
    assert_clear_error(result, "each machine of TF_CONFIG would decide for itself; name a --recipe")


def test_a_cpu_is_not_split_after_it_was_timed(pictures: Path, tmp_path: Path) -> None:
    words = ("train-vae", "--data", pictures, "--out", tmp_path / "run", "--minutes", 0.1, *TINY, "--set", "base_dim=4")
    assert_clear_error(inside(*words, "--devices", 2), "split only before it is used", "name a --recipe")


@pytest.fixture(scope="module")
def auto_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without --recipe, shrunk."""
    out = tmp_path_factory.mktemp("auto") / "run"
    result = inside("train-vae", "--data", pictures, "--out", out, "--minutes", 0.2, *TINY, *SHORT)
    assert result.returncode == 0, result.stderr
    assert "timing this machine, for 0.2 minutes" in result.stderr
    assert "plan: 48 pictures as 16x16 colour" in result.stderr
    assert "6 steps of 32 pictures" in result.stderr
    return out


def test_a_plan_is_kept_and_not_made_again(auto_run: Path, pictures: Path) -> None:
    recipe = json.loads((auto_run / "config.json").read_text())["recipe"]
    assert (recipe["name"], recipe["side"], recipe["epoch_steps"]) == ("auto", 16, 3)
    result = inside("train-vae", "--data", pictures, "--out", auto_run, "--minutes", 500)
    assert result.returncode == 0, result.stderr
    assert "going on with" in result.stderr
    assert "plan:" not in result.stderr
    assert "epoch 1/" not in result.stderr
    assert "next: export-onnx" in last_line(result)


def test_a_model_of_no_use_is_not_called_trained_without_a_word(auto_run: Path, pictures: Path) -> None:
    """Twelve steps: every reason is said, with the setting to change, and the last line says what was seen."""
    result = inside("train-vae", "--data", pictures, "--out", auto_run)
    assert "stage 1: 6 steps are few" in result.stderr
    assert "gamma" in result.stderr
    assert "balance_momentum" in result.stderr
    assert last_line(result).startswith("trained, but ")


def test_a_dry_run_needs_no_more_than_it_reads(pictures: Path, tmp_path: Path) -> None:
    named = inside("train-vae", "--recipe", "cifar10", "--dry-run")
    assert named.returncode == 0, named.stderr
    assert "epochs = 700" in named.stdout
    planned = inside("train-vae", "--data", pictures, "--minutes", 0.1, "--dry-run", *TINY, "--set", "base_dim=4")
    assert planned.returncode == 0, planned.stderr
    assert "name = auto" in planned.stdout
    assert_clear_error(inside("train-vae", "--dry-run"), "'--data'", code=2)
    assert_clear_error(inside("train-vae", "--data", pictures), "'--out'", code=2)
    words = ("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "x", "--minutes", 3)
    assert_clear_error(inside(*words), "--minutes counts without --recipe", code=2)


def test_a_warm_start_takes_what_fits_and_says_what_does_not(
    auto_run: Path, smoke_run: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("train-vae", "--data", pictures, "--from", auto_run, "--out")
    settings = [word for each in ("epochs=1", "epoch_steps=3", "priors=", "lr=1e-9") for word in ("--set", each)]
    warm = inside(*words, tmp_path / "warm", "--minutes", 0.1, *settings)
    assert warm.returncode == 0, warm.stderr
    assert f"layers start from {auto_run}" in warm.stderr
    assert "all " in warm.stderr
    config = json.loads((tmp_path / "warm" / "config.json").read_text())
    assert config["recipe"]["fc_dim"] == 8  # shapes are those of the run that it starts from
    assert len(config["from"]) == 64
    # At a vanishing rate the error stays where the other run's ended, which is not where noise begins.
    before, after = (
        [json.loads(line)["mse"] for line in (run / "history.jsonl").read_text().splitlines()]
        for run in (auto_run, tmp_path / "warm")
    )
    assert abs(after[0] - before[1]) < abs(after[0] - before[0])
    other = inside(*words, tmp_path / "other", "--recipe", "smoke", "--set", "fc_dim=8", "--set", "priors=")
    assert other.returncode == 0, other.stderr
    assert "have other shapes and start from noise: " in other.stderr
    again = inside(*words, tmp_path / "other", "--recipe", "smoke", "--set", "fc_dim=8", "--set", "priors=")
    assert again.returncode == 0, again.stderr
    nothing = inside(*words, tmp_path / "no", "--recipe", "smoke", "--set", "base_dim=3", "--set", "latent_dim=3")
    assert_clear_error(nothing, "no layer of", "leave --recipe out")
    missing = inside("train-vae", "--data", pictures, "--from", tmp_path, "--out", tmp_path / "x", "--recipe", "smoke")
    assert_clear_error(missing, "--from takes a finished run")


@given(items=st.integers(2, 40), batch=st.integers(1, 50), steps=st.integers(1, 30), epochs=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_epochs_of_so_many_steps_visit_all_pictures_alike(items: int, batch: int, steps: int, epochs: int) -> None:
    schedule = Schedule(1, items, epochs, batch, 1e-3, 1, seed=3, epoch_steps=steps)
    seen = np.concatenate([order(schedule, epoch) for epoch in range(epochs)])
    assert len(seen) == epochs * schedule.images == epochs * steps * min(batch, items)
    for at in range(0, len(seen) - items + 1, items):
        assert sorted(seen[at : at + items]) == list(range(items))


def test_the_page_of_settings_is_what_the_recipe_says() -> None:
    written = Path(__file__).parents[2].joinpath("docs", "settings.md").read_text()
    assert written == page(Recipe()), "make it again: train-vae --list-settings > docs/settings.md"
    assert all(f"`{name}`" in written for name in Recipe().to_dict() if name != "name")
