"""The noise contract: noise i of seed s depends on (s, i) and on nothing else.

docs/noise.md defines it for any language, with test vectors.
"""

from __future__ import annotations

import operator

import numpy as np
import numpy.typing as npt

SEEDS = 2**64
INDICES = 2**63

Noise = npt.NDArray[np.float32]


def words(size: int) -> int:
    """Return how many 64-bit words one sample of `size` normals takes: size rounded up to a multiple of 4."""
    return -(-size // 4) * 4


def check_range(seed: int, start: int, count: int) -> None:
    """Raise ValueError unless a seed and a range of indices are whole numbers that the contract covers."""
    try:
        numbers = [operator.index(each) for each in (seed, start, count)]
    except TypeError:
        numbers = [-1]
    if min(numbers) < 0 or numbers[0] >= SEEDS or sum(numbers[1:]) > INDICES:
        raise ValueError(
            "seed, start and count must be whole numbers from 0, seed below 2^64, and start + count 2^63 or less. "
            f"Received: {seed}, {start}, {count}"
        )


def draw(seed: int, start: int, count: int, size: int) -> Noise:
    """Return the noise of samples start ... start + count - 1.

    One jump of the counter-based generator Philox 4x64-10, then one vectorised Box-Muller transform.

    Args:
        seed: 0 <= seed < 2^64.
        start: First index; 0 <= start and start + count <= 2^63.
        count: Samples, 0 or more.
        size: Normals a sample, 1 or more.

    Returns:
        float32 [count, size], standard normal.

    Raises:
        ValueError: an argument out of its range.

    >>> draw(seed=7, start=100, count=2, size=64).shape
    (2, 64)
    """
    check_range(seed, start, count)
    seed, start, count, size = map(operator.index, (seed, start, count, size))
    if size < 1:
        raise ValueError(f"size must be 1 or more. Received: {size}")
    width = words(size)
    generator = np.random.Philox(key=seed)
    generator.advance(start * width // 4)  # one step of the counter gives four words
    raw = generator.random_raw(count * width).reshape(count, width // 2, 2)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0 or 1
    radius = np.sqrt(-2.0 * np.log(uniform[..., 0]))
    angle = 2.0 * np.pi * uniform[..., 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return np.ascontiguousarray(normal.reshape(count, width)[:, :size], dtype=np.float32)
