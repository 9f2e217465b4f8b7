"""Recipes: which settings are read with which others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from training.errors import RecipeError
from training.recipe import Recipe
from training.recipes import RECIPES, recipe

STAGE_2 = ["second_dim=9", "second_depth=2", "epochs2=3", "lr2=0.1", "halve_every2=7", "balance2=learned"]
READ = [  # what else is set, and what counts then
    ([], ["kl_weight=2", "balance_momentum=0.5", "balance_minimum=false", "l2_down=0.1", *STAGE_2]),
    (["balance=fixed"], ["gamma=0.5", "balance_momentum=0.5"]),  # stage 2's is computed still
    (["balance=annealed"], ["gamma=0.5", "anneal_epochs=3"]),
    (["balance2=annealed"], ["gamma2=0.5", "anneal_epochs=3"]),
    (["first_stage=rae-l2"], ["embedding=0.1", "regularisation=0.1"]),
    (["first_stage=rae-gp"], ["embedding=0.1", "regularisation=0.1"]),
    (["first_stage=rae-sn"], ["embedding=0.1", *STAGE_2]),
    (["priors=gaussian,gmm"], ["gmm_components=5", "kl_weight=2"]),
]
NOT_READ = [
    ([], ["gamma=0.5", "gamma2=0.5", "anneal_epochs=3", "embedding=0.1", "regularisation=0.1", "gmm_components=5"]),
    (["balance=learned", "balance2=learned"], ["gamma=0.5", "balance_momentum=0.5", "balance_minimum=false"]),
    (["balance2=fixed"], ["gamma=0.5", "anneal_epochs=3"]),
    (["priors=gaussian"], [*STAGE_2, "gmm_components=5"]),
    (["priors=gmm", "balance=fixed"], ["balance_momentum=0.5"]),
    (["first_stage=ae"], ["embedding=0.1", "regularisation=0.1", "kl_weight=2", "balance=fixed"]),
    (["first_stage=rae-sn"], ["regularisation=0.1"]),
    (["num_scale=1"], ["l2_down=0.1"]),
]


@pytest.mark.parametrize(("others", "settings"), READ)
def test_settings_that_count_are_set(others: list[str], settings: list[str]) -> None:
    for setting in settings:
        assert recipe("smoke").set([*others, setting]) != recipe("smoke").set(others)


@pytest.mark.parametrize(("others", "settings"), NOT_READ)
def test_a_setting_without_effect_is_refused(others: list[str], settings: list[str]) -> None:
    for setting in settings:
        key = setting.partition("=")[0]
        with pytest.raises(RecipeError, match=f"^{key} changes nothing in this recipe: it counts with "):
            recipe("smoke").set([*others, setting])


def test_recipes_are_told_apart_by_what_counts() -> None:
    plain = recipe("smoke")
    assert plain.effective() == replace(plain, lr3=1.0, embedding=0.5).effective()
    sharp = plain.set(["epochs3=1"])
    assert sharp.effective() != replace(sharp, lr3=1.0).effective()


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_take_what_they_are_made_of(name: str) -> None:
    made = recipe(name)
    assert made.name == name
    assert Recipe.from_dict(made.to_dict()) == made == made.set(["epochs=1"]).set([f"epochs={made.epochs}"])


WRONG = [("side", "32"), ("side", 32.0), ("crop", None), ("crop", (0, 0, 0, "9")), ("flip", 1), ("limit", True)]
WRONG += [("resize", 3), ("lr", "4e-4"), ("validation", False), ("priors", "gmm"), ("name", None)]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    """As a file may hold any, which others wrote or changed."""
    values = {**recipe("smoke").to_dict(), key: list(value) if isinstance(value, tuple) else value}
    with pytest.raises(RecipeError, match=rf"^{key} takes .*Received: "):
        Recipe.from_dict(values)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_was_written(name: str) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe(name).to_dict()))) == recipe(name)
