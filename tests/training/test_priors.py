"""Priors: what is fitted to latents, as one network from noise."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import assert_clear_error, command, inside
from training.cli import main as train_vae
from training.model import priors
from training.recipe import BALANCES, FIRST_STAGES
from training.record.models import load_model, save_model

SIZE = 3


def covariances(rng: np.random.Generator, count: int) -> np.ndarray:
    roots = rng.standard_normal((count, SIZE, SIZE))
    return roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(SIZE)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_a_gaussian_has_the_moments_it_was_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean, (covariance,) = rng.standard_normal(SIZE), covariances(rng, 1)
    drawn = priors.gaussian(mean, covariance).predict(rng.standard_normal((50_000, SIZE)), batch_size=10_000, verbose=0)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.05 * np.sqrt(scale.max()))
    assert np.abs((np.cov(drawn.T) - covariance) / scale).max() < 0.05


@given(seed=st.integers(0, 2**32), count=st.integers(2, 5))
@settings(max_examples=5, deadline=None)
def test_a_mixture_chooses_by_the_last_column_and_nothing_else(seed: int, count: int) -> None:
    """Each sample is exactly what its component alone would have made of the same noise."""
    rng = np.random.default_rng(seed)
    weights, means = rng.dirichlet(np.ones(count) * 5), rng.standard_normal((count, SIZE)) * 10
    shapes = covariances(rng, count)
    noise = rng.standard_normal((20_000, SIZE + 1)).astype(np.float32)
    drawn = priors.gmm(weights, means, shapes).predict(noise, batch_size=5000, verbose=0)
    alone = np.stack([means[k] + noise[:, :SIZE] @ np.linalg.cholesky(shapes[k]).T for k in range(count)])
    chosen = np.argmin(np.abs(alone - drawn).sum(axis=2), axis=0)
    np.testing.assert_allclose(drawn, alone[chosen, np.arange(len(noise))], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.bincount(chosen, minlength=count) / len(noise), weights, atol=0.02)
    order = np.argsort(noise[:, SIZE])
    assert np.all(np.diff(chosen[order]) >= 0)


def test_fitted_mixtures_describe_what_they_saw_and_survive_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latents = np.concatenate([rng.normal(-4, 1, (3000, SIZE)), rng.normal(4, 0.5, (1000, SIZE))]).astype(np.float32)
    for name in ("gaussian", "gmm"):
        save_model(tmp_path / f"{name}.keras", priors.fit(name, latents, 2, seed=0))
        model = load_model(tmp_path / f"{name}.keras")
        drawn = model.predict(rng.standard_normal((40_000, *model.input_shape[1:])), batch_size=10_000, verbose=0)
        np.testing.assert_allclose(drawn.mean(axis=0), latents.mean(axis=0), atol=0.1)
        np.testing.assert_allclose(np.cov(drawn.T), np.cov(latents.T), atol=0.4)
        between = np.mean(np.abs(drawn[:, 0]) < 1)
        assert between < 0.01 if name == "gmm" else between > 0.1  # a mixture leaves the gap empty


NAMES = ("gaussian", "gmm", "second-stage")
COMBINATIONS = [f"first_stage={name}" for name in FIRST_STAGES] + [f"balance={name}" for name in BALANCES[1:]]


@pytest.mark.parametrize("setting", COMBINATIONS)
def test_any_policy_and_first_stage_go_with_any_prior(setting: str, pictures: Path, tmp_path: Path) -> None:
    """train-vae, in this process: each of the paper's rows in small."""
    out = tmp_path / "run"
    words = ["--recipe", "smoke", "--data", pictures, "--out", out, "--set", setting, "--set", "epochs=3"]
    words += ["--set", f"priors={','.join(NAMES)}", "--set", setting.replace("balance", "balance2")]
    result = CliRunner().invoke(train_vae, list(map(str, words)))
    assert result.exit_code == 0, result.output
    for name in ("normal", *NAMES):
        assert (out / "samples" / f"{name}.png").exists()
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    first = [record for record in history if record["stage"] == 1]
    assert first[-1]["mse"] < first[0]["mse"]
    assert all(np.isfinite(value) for record in history for value in record.values() if isinstance(value, float))
    gammas = [record.get("gamma") for record in first]
    if setting == "first_stage=vae":
        assert gammas[0] > gammas[-1]  # computed, by default
    if setting in ("balance=fixed", "balance=annealed"):
        assert gammas == [1, 1, 1]


@pytest.mark.parametrize("prior", ["gaussian", "gmm"])
def test_an_ex_post_density_is_exported_like_any_other(prior: str, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--set", "first_stage=rae-l2", "--set", f"priors={prior}", "--set", "latent_dim=6")
    assert inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", out, *words).returncode == 0
    result = inside("export-onnx", out, "--prior", prior, "--out", tmp_path / "x.onnx")
    assert result.returncode == 0, result.stderr
    sampled = command("sample-cli", "--model", tmp_path / "x.onnx", "--n", 3, "--out", tmp_path / "x")
    assert sampled.returncode == 0, sampled.stderr


def test_too_few_pictures_for_a_mixture_is_told_before_training(pictures: Path, tmp_path: Path) -> None:
    words = ("--set", "priors=gmm", "--set", "gmm_components=49")
    result = inside("train-vae", "--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run", *words)
    assert_clear_error(result, "a mixture of 49", "Received: 48", "gmm_components")
    assert not (tmp_path / "run" / "history.jsonl").exists()
