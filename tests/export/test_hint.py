"""What train-vae says to do next is done as it is printed, for every kind of recipe."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest
from click.testing import CliRunner

from export.cli import main as export_onnx
from export.exportable import prior_of
from serve.bundle import load
from training.cli import main as train_vae
from training.recipe import PRIORS
from training.recipes import RECIPES, recipe

SMALL = ["side=16", "crop=0,0,0,0", "num_scale=1", "depth_per_block=1", "base_dim=4", "fc_dim=8", "latent_dim=4"]
SHORT = ["batch=24", "epochs=1"]
OF_PRIORS = {"second-stage": ["second_dim=8", "second_depth=1", "epochs2=1"], "gmm": ["gmm_components=2"]}

# One recipe of each kind: the others differ in sizes, schedules and balances, which no export sees.
KINDS = {
    (first if (first := each().first_stage) in ("vae", "rae-sn") else "ae", each().priors): name
    for name, each in reversed(RECIPES.items())
    if name != "smoke"
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS.values())
def test_the_hint_of_every_kind_of_recipe_is_a_command_that_works(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = f"runs/my {name}"
    settings = [*SMALL, *SHORT, *(each for prior in recipe(name).priors for each in OF_PRIORS.get(prior, []))]
    settings += ["epochs3=1", "critic_dim=4"] if recipe(name).epochs3 else []
    words = ["--recipe", name, "--data", str(pictures), "--out", out]
    trained = CliRunner().invoke(train_vae, [*words, *(word for each in settings for word in ("--set", each))])
    assert trained.exit_code == 0, trained.output
    (hint,) = re.findall(r"next: (.*)$", trained.stderr, re.MULTILINE)
    program, *hinted = shlex.split(hint)
    assert program == "export-onnx"
    exported = CliRunner().invoke(export_onnx, hinted)
    assert exported.exit_code == 0, exported.output
    (file,) = tmp_path.glob("*.onnx")
    card = load(file).card
    assert card.name == f"my-{name}"  # two models are not both called "model"
    assert card.prior == ("second-stage" if "second-stage" in recipe(name).priors else "gmm")


@pytest.mark.parametrize(
    ("fitted", "default"),
    [((), "normal"), (("gaussian",), "gaussian"), (PRIORS[::-1], "second-stage"), (("gaussian", "gmm"), "gmm")],
)
def test_the_default_prior_is_the_first_that_the_run_has(fitted: tuple[str, ...], default: str, tmp_path: Path) -> None:
    config = {"recipe": replace(recipe("smoke"), priors=fitted).to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert prior_of(tmp_path) == default
