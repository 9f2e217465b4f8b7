"""What docs/compatibility.md promises of bundles: cards of schema 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.card import Card

ROOT = Path(__file__).parents[1]
REQUIRED = [
    "name",
    "image_shape",
    "noise_size",
    "latent_size",
    "prior",
    "normalisation",
    "precision",
    "recipe",
]  # of schema 1


@pytest.fixture
def first() -> dict[str, Any]:
    """The embedded faces' card, as version 0.1.0 wrote it."""
    return dict(json.loads((ROOT / "tests/data/card-0.1.0.json").read_text()))


def test_cards_of_the_first_version_are_read_as_they_are(first: dict[str, Any]) -> None:
    said = json.loads(Card.from_json(json.dumps(first)).to_json())
    assert {key: said[key] for key in first} == first


def test_a_later_field_is_optional(first: dict[str, Any]) -> None:
    least = {key: first[key] for key in REQUIRED}
    assert Card.from_json(json.dumps(least)).image_shape == (64, 64, 3)


def test_a_later_versions_field_is_dropped(first: dict[str, Any]) -> None:
    card = Card.from_json(json.dumps({**first, "field_of_a_later_version": 1}))
    assert card == Card.from_json(json.dumps(first))
