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


def between(first: Noise, last: Noise, steps: int) -> Noise:
    """Return the way from one sample's noise to another's along the great circle, which keeps it as likely as its ends.

    Spherical interpolation (Shoemake 1985), as White (arXiv 1609.04468) has it for latents: the straight way leads
    through noise that is too short for a normal. Computed in float64; ends are as they came.

    Args:
        first: float32 [size].
        last: float32 [size].
        steps: Of the way, both ends among them; 2 or more.

    Returns:
        float32 [steps, size].

    Raises:
        ValueError: steps is less than 2.
    """
    if steps < 2:
        raise ValueError(f"steps must be 2 or more. Received: {steps}")
    a, b = first.astype(np.float64), last.astype(np.float64)
    at = np.linspace(0.0, 1.0, steps)[:, None]
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip(a @ b / lengths, -1.0, 1.0)) if lengths else 0.0
    if np.sin(angle) < 1e-6:  # the same direction, or exactly the opposite one: there is no one great circle
        way = (1 - at) * a + at * b
    else:
        way = (np.sin((1 - at) * angle) * a + np.sin(at * angle) * b) / np.sin(angle)
    way[0], way[-1] = a, b
    return way.astype(np.float32)


def way(seed: int, first: int, last: int, steps: int, temperature: float, size: int) -> Noise:
    """Return the noise of the way from one sample of a seed to another, `between` them, scaled by a temperature.

    Args:
        seed: Of both samples.
        first: Index of the sample at its beginning.
        last: Index of the sample at its end.
        steps: Of the way, both ends among them; 2 or more.
        temperature: The scale of the noise.
        size: Values of one sample's noise.

    Returns:
        float32 [steps, size].

    Raises:
        ValueError: steps is less than 2, or as `draw`.
    """
    a, b = (draw(seed, index, 1, size)[0] for index in (first, last))
    return between(a, b, steps) * np.float32(temperature)
