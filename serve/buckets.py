"""Buckets: the few batch sizes that an engine runs, each of which has to give the same bytes.

Providers tune themselves to a shape, and the noise contract needs a sample to be the same bytes whatever shares its
batch. That is not taken on trust: one bucket is the reference, and every other one has to make the reference's bytes
before it is used for the first time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np

from serve.devices import Device
from serve.errors import EngineError
from serve.model import Images
from serve.noise import Noise, draw

BATCH = {"cuda": 256, "tensorrt": 256, "openvino": 64, "cpu": 32}  # the most samples at a time where none is asked for
REFERENCE = 8  # the bucket that decides on a CPU, whatever the largest one is
GPU_BUCKET = 64  # the only one on a GPU
SEEN = 8  # samples, at least, that each bucket is compared in

log = logging.getLogger(__name__)

Run = Callable[[Noise, int], Images]  # noise of at most so many samples as a bucket, and the bucket


def sizes(device: Device, batch: int = 0) -> list[int]:
    """Return the buckets to try on a device, ascending, for at most `batch` samples at a time; 0 is the default.

    A CPU takes as long as there are rows, so no batch is padded by more than half its size. A GPU's libraries have
    other kernels, with other roundings, for other sizes: on an H200 none of 1, 16, 256 and 1024 made the bytes of 64.
    One size for all is quick for a single sample, and has most of the speed of larger ones.
    """
    if device.gpu:
        return [GPU_BUCKET]
    batch = batch or BATCH[device.kind]
    steps = (1, 2, *(n << p for p in range(16) for n in (3, 4)))
    return [*(size for size in steps if size < batch), batch]


def reference(device: Device) -> int:
    """Return the bucket whose bytes are a sample's: one for all engines on such a device, whatever their batch."""
    return GPU_BUCKET if device.gpu else REFERENCE


class Buckets:
    """The sizes of one engine.

    Args:
        tried: Sizes, ascending.
        reference: The size that decides; it need not be among them.
        run: Runs a bucket.
        noise_size: Values of noise a sample.
        name: Of the model and where it runs, for messages.
        least: Runs, at least, that each bucket is compared in.

    Raises:
        EngineError: even in the reference, samples depend on what shares their batch.
    """

    def __init__(
        self, tried: Sequence[int], reference: int, run: Run, noise_size: int, name: str, least: int = 1
    ) -> None:
        self._tried, self._reference, self._run, self._noise_size = tried, reference, run, noise_size
        self._name, self._least = name, least
        self._held = sorted({*tried, reference})
        shift = reference // 2
        self._noise = draw(0, 0, reference + shift, noise_size)
        first, again = run(self._noise[:reference], reference), run(self._noise[shift:], reference)
        # Half of the samples again: in other rows, beside other samples.
        if not np.array_equal(again[: reference - shift], first[shift:]):
            raise EngineError(
                f"in {name} samples depend on what shares their batch, which breaks the noise contract; choose another "
                "--device"
            )
        self._wanted = np.concatenate([first, again[reference - shift :]])
        self._agreed = {reference: True}
        self._one = Lock()

    def usable(self) -> list[int]:
        """Return those that give the reference's bytes, ascending; each has run then."""
        return [size for size in self._tried if self._agrees(size)]

    def least(self, rows: int) -> int | None:
        """Return the smallest one that holds so many samples and gives the reference's bytes; None where none does."""
        return next((size for size in self._held if size >= rows and self._agrees(size)), None)

    def most(self) -> int:
        """Return the largest one that gives the reference's bytes."""
        return next(size for size in reversed(self._held) if self._agrees(size))

    def _agrees(self, size: int) -> bool:
        with self._one:
            if size not in self._agreed:
                self._agreed[size] = self._gives_the_same(size)
                if not self._agreed[size]:
                    log.info("%s: batches of %d differ from those of %d", self._name, size, self._reference)
            return self._agreed[size]

    def _gives_the_same(self, size: int) -> bool:
        while len(self._wanted) <= size:
            more = draw(0, len(self._wanted), self._reference, self._noise_size)
            made = self._run(more, self._reference)  # before either grows, as it may fail and be tried again
            self._noise, self._wanted = np.concatenate([self._noise, more]), np.concatenate([self._wanted, made])
        # Begun at 1, no sample is in the row that it has in the reference.
        starts = np.linspace(1, len(self._noise) - size, max(self._least, SEEN // size)).astype(int)
        parts = [slice(at, at + size) for at in starts]
        return all(np.array_equal(self._run(self._noise[part], size), self._wanted[part]) for part in parts)
