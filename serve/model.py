"""What can be sampled: one interface for a bundle in this process (`Engine`) and a model on a server (`RemoteModel`).

Both take the same arguments and refuse the same ones, with a ValueError that says what was expected.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from serve.card import Card
from serve.noise import Noise, check_range

if TYPE_CHECKING:
    from PIL.Image import Image

EXACT = "exact"  # float32 without shortcuts; the other arithmetics are named by their numbers, such as "bfloat16"
MOST_TEMPERATURE = 100.0
MOST_NOISE = 1000.0  # absolute value; the hottest noise that a seed gives stays below it

Images = npt.NDArray[np.uint8]
Decode = Callable[[Noise], Images]  # noise float32 [n, noise_size] -> images uint8 [n, height, width, channels]


@runtime_checkable
class GenerativeModel(Protocol):
    """A model that makes images from noise.

    Images are uint8 [n, height, width, channels], maybe read-only. The same seed and index give the same image: on
    any device in exact arithmetic, to one grey level; in another one, on devices of one kind.

    Attributes:
        card: What the model says of itself.
        digest: SHA-256 of the model file.
        arithmetic: EXACT, or the numbers that it computes in instead: "bfloat16" or "float16".
    """

    card: Card
    digest: str
    arithmetic: str

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def batch(self) -> int:
        """How many samples are computed, or sent, at a time. Calls take any number."""

    def sample(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Images:
        """Return samples start ... start + count - 1 of a seed.

        Args:
            seed: 0 <= seed < 2^64.
            start: The first index, 0 or more; start + count <= 2^63.
            count: How many, 0 or more.
            temperature: The scale of the noise, from 0 to 100.

        Raises:
            ValueError: an argument is not in its range.
            ServeError: the device, or the server, fails.
        """

    def pictures(self, seed: int, start: int, count: int, temperature: float = 1.0) -> list[Image]:
        """Return what `sample` returns as Pillow images, to show, change or save.

        Raises:
            As `sample`.
        """

    def decode(self, noise: npt.ArrayLike) -> Images:
        """Return the images of noise [n, noise_size], n of any size.

        Raises:
            ValueError: it has another shape, or values that are not finite or beyond 1000.
            ServeError: the device, or the server, fails.
        """

    def stream(self, seed: int, start: int, count: int, temperature: float = 1.0) -> Iterator[tuple[int, Images]]:
        """Yield (first index, images) for the range that `sample` would return, in order, a batch or so at a time.

        Raises:
            As `sample`; all of it when the first images are asked for, or later.
        """


def check_sampling(seed: int, start: int, count: int, temperature: float) -> tuple[int, int, int]:
    """Return seed, start and count as Python's own numbers, which do not overflow as NumPy's do.

    Raises:
        ValueError: `GenerativeModel.sample` does not take these arguments.
    """
    check_range(seed, start, count)
    try:
        within = 0 <= temperature <= MOST_TEMPERATURE  # nor NaN
    except TypeError:
        within = False
    if not within:
        raise ValueError(f"temperature must be from 0 to {MOST_TEMPERATURE:.0f}. Received: {temperature}")
    return operator.index(seed), operator.index(start), operator.index(count)


def as_noise(noise: npt.ArrayLike, size: int) -> Noise:
    """Return noise as float32 [n, size] in C order.

    Raises:
        ValueError: it has another shape, or values that no model takes.
    """
    try:
        values = np.ascontiguousarray(noise, np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"noise must be numbers of the shape [n, {size}]: {error}") from None
    if values.ndim != 2 or values.shape[1] != size:
        raise ValueError(f"noise must have the shape [n, {size}]. Received: {list(np.shape(values))}")
    check_noise(values)
    return values


def check_noise(noise: Noise) -> None:
    """Raise ValueError where a value is not finite, or further from zero than any noise."""
    largest = np.abs(noise).max(initial=0)
    if not largest <= MOST_NOISE:  # nor NaN
        raise ValueError(f"noise must be finite and within {MOST_NOISE:.0f} of 0. Received: {largest}")
