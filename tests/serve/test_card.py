"""What a bundle may say of itself: its card is typed and bounded, and whatever else it says is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.bundles.inspect import render
from serve.bundle import CARD_KEY, check, load
from serve.card import MOST_CARD, MOST_PICTURE, Card
from serve.errors import BundleError
from serve.server.models import FILE_BYTES, MESSAGE_BYTES, Limits

CARD_VALUES = {
    "name": (5, "", "a/b", "é", "a\n", "\x1b[2J", "\ud800", "x" * 65, "-x", None),
    "image_shape": ([math.inf, 16, 3], [16, 16], [16, 16, 2], [100_000, 100_000, 3], [True, 1, 1], [16.0, 16, 3], 16),
    "noise_size": (8.0, 0, -1, 2**17, True, "8"),
    "latent_size": (None, [8]),
    "prior": ({}, "x" * 65, "a\x00"),
    "precision": ({"fp32": 1}, "fp64", ["fp32"]),
    "store": ("float64", 16),
    "licence": ("two\nlines", 5),
    "notes": ("\x1b]0;title\x07", "x" * 10_001, "\u202eback"),
    "normalisation": ({}, {"mode": 5}, {"mode": "none", "scale": math.nan}, []),
    "recipe": ([], {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}, {"a": 10**40}, {"a\n": 1}),
    "metrics": ({}, [1], [{"value": math.inf}], [{"metric": "\x1b"}], [{"x": ["y" * 100] * 1000}]),
    "producers": ({"keras": 3}, {"keras\n": "3"}, []),
    "difference": ({"mean": 1.0}, {"mean": "1", "worst": 1, "samples": 1}, 5),
    "verification": ({"checker": "onnx"}, [1]),
}


def with_card(path: Path, text: str) -> bytes:
    model = onnx.load(path)
    next(each for each in model.metadata_props if each.key == CARD_KEY).value = text
    return bytes(model.SerializeToString())


def card_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(load(path).card.to_json()))


def assert_fit(text: str) -> None:
    """One bounded line that a terminal and a log can show."""
    assert text.isprintable(), text
    assert len(text) <= 300, text


@pytest.mark.parametrize("field", CARD_VALUES)
def test_a_card_of_other_values_is_refused(field: str, smoke_bundle: Path) -> None:
    good = card_of(smoke_bundle)
    for value in CARD_VALUES[field]:
        with pytest.raises(BundleError) as error:
            check(with_card(smoke_bundle, json.dumps({**good, field: value})))
        assert_fit(str(error.value))
        assert "card" in str(error.value)


def test_cards_that_are_no_cards_are_refused(smoke_bundle: Path) -> None:
    good = json.dumps(card_of(smoke_bundle))
    for text in (
        "",
        "[]",
        "5",
        '[["name", "x"]]',
        "[" * 60_000,
        "[" * 200_000,
        good[:-1],
        good + " " * 2**16,
        "x" * 6_000_000,
    ):
        with pytest.raises(BundleError, match=r"card|holds text of 6,000,000 bytes") as error:
            check(with_card(smoke_bundle, text))
        assert_fit(str(error.value))


def test_a_card_may_say_much_in_any_language(smoke_bundle: Path) -> None:
    values = card_of(smoke_bundle)
    values["notes"] = "Zwei Zeilen:\nこんにちは\u3000世界 👩\u200d🎤\n" * 100
    values["image_shape"] = [1024, 1024, 3]
    values["metrics"] = [{"metric": "FD", "value": 55.3, "reference": {"split": "test", "of": [1, 2]}}] * 100
    values["of_a_later_version"] = "dropped"
    card = Card.from_json(json.dumps(values))
    assert Card.from_json(card.to_json()) == card
    assert card.notes == values["notes"]


def test_one_picture_always_fits_a_message() -> None:
    for encoding in ("count", "files"):
        assert getattr(Limits.of(1, MOST_PICTURE), encoding) == 1
    assert MOST_PICTURE * 5 // 4 + FILE_BYTES <= MESSAGE_BYTES


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_a_card_says_it_is_a_card_or_refused(smoke_bundle: Path, data: st.DataObject) -> None:
    values = card_of(smoke_bundle)
    place, key = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(JSON)
    try:
        card = check(with_card(smoke_bundle, json.dumps(values)))
    except BundleError as error:
        assert_fit(str(error))
        return
    text = card.to_json()
    assert Card.from_json(text) == card
    assert len(text) <= MOST_CARD
    assert "\x1b" not in render({**FACTS, "card": dataclasses.asdict(card)})


FACTS = {
    "digest": "", "bytes": 0, "inputs": [], "outputs": [], "nodes": 0, "operators": {}, "parameters": 0, "kept_in": {},
    "flops": None, "activation_bytes": None,
}  # fmt: skip
