"""The noise contract."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.noise import draw, words

DOCUMENT = Path(__file__).parents[2] / "docs" / "noise.md"
MASK = 2**64 - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox 4x64-10 as its paper defines it, in integers: the contract without NumPy."""
    c = [(counter >> (64 * i)) & MASK for i in range(4)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def by_the_book(seed: int, index: int, size: int) -> list[float]:
    """One sample's noise from docs/noise.md's text alone."""
    blocks = words(size) // 4
    # The counter is stepped before each block.
    raw = [word for block in range(blocks) for word in philox(index * blocks + block + 1, seed)]
    normals = []
    for one, two in zip(raw[::2], raw[1::2], strict=True):
        a, b = ((word >> 11) * 2.0**-53 + 2.0**-54 for word in (one, two))
        radius, angle = math.sqrt(-2 * math.log(a)), 2 * math.pi * b
        normals += [radius * math.cos(angle), radius * math.sin(angle)]
    return normals[:size]


@given(
    seed=st.integers(0, 2**64 - 1),
    index=st.one_of(st.integers(0, 1000), st.integers(0, 2**63 - 1)),
    size=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_it_is_what_the_document_says(seed: int, index: int, size: int) -> None:
    noise = draw(seed, index, 1, size)[0]
    np.testing.assert_allclose(noise, by_the_book(seed, index, size), rtol=2e-7, atol=1e-12)


@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**63 - 300),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    size=st.integers(1, 130),
)
@settings(deadline=None)
def test_any_split_of_a_range_gives_the_same_samples(seed: int, start: int, cuts: list[int], size: int) -> None:
    edges = [0, *sorted(cuts), 200]
    parts = [draw(seed, start + a, b - a, size) for a, b in pairwise(edges)]
    whole = draw(seed, start, 200, size)
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    assert whole.dtype == np.float32
    assert whole.shape == (200, size)


def test_the_documents_vectors() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (.+) \|$", DOCUMENT.read_text(), re.M)
    assert len(rows) >= 6
    for seed, index, size, values in rows:
        wanted = [np.float32(value) for value in values.split()]
        assert draw(int(seed), int(index), 1, int(size))[0][: len(wanted)].tolist() == wanted


def test_it_is_standard_normal() -> None:
    noise = draw(3, 0, 20_000, 16)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert 4 < np.abs(noise).max() < 7
    assert abs(np.corrcoef(noise, rowvar=False) - np.eye(16)).max() < 0.05


@pytest.mark.parametrize(
    ("seed", "start", "count", "size"),
    [
        (-1, 0, 1, 4),
        (2**64, 0, 1, 4),
        (0, -1, 1, 4),
        (0, 0, -1, 4),
        (0, 2**63, 1, 4),
        (0, 2**63 - 1, 2, 4),
        (0, 0, 1, 0),
    ],
)
def test_what_is_out_of_range_is_refused(seed: int, start: int, count: int, size: int) -> None:
    with pytest.raises(ValueError, match="Received"):
        draw(seed, start, count, size)
