"""evaluate-vae compare: which figures may stand side by side, and which is best."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import pytest

from training.errors import DataError
from training.evaluation.compare import Measured, compare


def measured(name: str, value: float, mse: float = 0.01, **changes: Any) -> Measured:
    extractor = {"name": "tiny", "digest": "d" * 64, "features": 8, "resize": "in the model"}
    against = {"data": "c" * 32, "split": "train", "count": 60, "of": 90, "read": "16x16x3"}
    extractor |= {key: changes.pop(key) for key in list(changes) if key in extractor}
    against |= {key: changes.pop(key) for key in list(changes) if key in against and key != "count"}
    common = {"count": 60, "seed": 0, "reference": against, **changes}
    one = {"metric": "FD (tiny)", "set": "GEN-1", "normalisation": "none", "value": value, "kid": value / 100}
    one |= {"kid_subsets": 50, "kid_subset": 30, "extractor": extractor, **common}
    latents = {"metric": "latents", "mse": mse, "inactive": 3, "variance_law": 0.9, **common}
    return Measured(name, {"name": "smoke", "first_stage": "vae", "epochs": 2}, [one, latents])


def test_the_best_of_a_column_is_bold() -> None:
    text = compare([measured("one", 12.5, 0.02), measured("two", 11.5, 0.03), measured("two", 13.5, 0.04)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == [
        "run",
        "recipe",
        "first stage",
        "balance",
        "epochs",
        "of stage 2",
        "mse",
        "inactive",
        "variance law",
    ]
    assert rows[2] == ["one", "smoke", "vae", "-", "2", "-", "**0.02000**", "3", "0.9000"]
    assert ["FD (tiny)", "GEN-1"] in rows
    assert ["KID (tiny)", "GEN-1"] in rows
    assert ["one", "12.5"] in rows
    assert ["two (1)", "**11.5**"] in rows
    assert ["two (2)", "13.5"] in rows
    assert "sha256 dddd" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "e" * 64}, "the extractor's digest"),
        ({"data": "other"}, "the reference's data"),
        ({"split": "test"}, "the reference's split"),
        ({"count": 50}, "the count is 60 in one and 50 in two"),
        ({"seed": 1}, "the seed"),
    ],
)
def test_protocols_do_not_share_a_column(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match="measured in different ways") as error:
        compare([measured("one", 12.5), measured("two", 11.5, **change)])
    assert words in str(error.value)


def test_a_distance_that_is_not_there_is_a_dash_and_wins_nothing() -> None:
    one, two = measured("one", 12.5), measured("two", 11.5)
    for each in (one, two):
        each.records[0]["value"] = None
    text = compare([one, two])
    assert "| FD (tiny)" not in text  # the column would be empty
    assert "**0.11500**" in text  # and KID is there
    assert "No FD (tiny)" in text
    one.records[0]["value"] = 12.5
    lines = compare([one, two]).splitlines()
    assert any(line.startswith("| two") and line.split("|")[2].strip() == "-" for line in lines)
    assert "**12.5**" not in compare([one, two])


def test_an_error_of_a_sharpened_decoder_stands_beside_no_other() -> None:
    text = compare([measured("one", 12.5, 0.02, decoder="sharpened"), measured("two", 11.5, 0.03)])
    assert "| one | smoke  | vae         | -       | 2      | -          | -       | 3        | 0.9000 " in text
    assert "0.03000" in text


def test_runs_measured_twice_are_compared_where_they_agree() -> None:
    one, two = measured("one", 12.5), measured("two", 11.5)
    more = measured("one", 99.0, count=600)
    text = compare([Measured("one", one.recipe, [*more.records, *one.records]), two])
    assert "12.5" in text
    assert "99" not in text
