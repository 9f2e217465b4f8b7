"""A few pictures side by side: those between two samples, or the same samples at several temperatures.

A folder of these is a pure function of its manifest, and small. So the same command writes all of it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from serve.bulk.job import make, versions
from serve.bulk.store import MANIFEST, Store, is_passing
from serve.encoding import ENDINGS, animation, contact_sheet, encode, sheet
from serve.errors import JobError
from serve.model import GenerativeModel, Images
from serve.noise import way

WAY = "way.webp"
SHEET, ANIMATION = "temperatures.png", "temperatures.webp"
COLUMNS = 8  # of an animation's frame

Done = Callable[[int], None]


class Sweep(Protocol):
    """What changes from picture to picture; all else stays.

    Attributes:
        kind: What it is called in a manifest.
        shown: The name of the file to look at first.
    """

    kind: str
    shown: str

    @property
    def total(self) -> int:
        """How many pictures there are."""

    def facts(self) -> dict[str, Any]:
        """Return what the pictures depend on beside the model, as JSON has it."""

    def batches(self, model: GenerativeModel) -> Iterator[Images]:
        """Yield all pictures, a batch at a time.

        Raises:
            ServeError: the device, or the server, fails.
        """

    def rows(self, images: Images) -> Iterator[tuple[str, Images]]:
        """Yield the pictures to be seen together, and what these are."""

    def files(self, images: Images, encoding: str) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the bytes of every file.

        Args:
            images: All pictures, in order.
            encoding: What single ones are encoded as, one of `encoding.FORMATS`.
        """


@dataclass(frozen=True)
class Interpolation:
    """The way from one sample to another along the great circle of their noise (`serve.noise.between`).

    Attributes:
        seed: Of both.
        first: Index of the sample that it begins with.
        last: Index of the sample that it ends with.
        steps: Pictures on it, both ends among them; 2 or more.
        temperature: The scale of the noise.
    """

    seed: int
    first: int
    last: int
    steps: int
    temperature: float

    kind = "interpolation"
    shown = WAY

    @property
    def total(self) -> int:
        return self.steps

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def batches(self, model: GenerativeModel) -> Iterator[Images]:
        noise = way(self.seed, self.first, self.last, self.steps, self.temperature, model.card.noise_size)
        for at in range(0, len(noise), model.batch):
            yield model.decode(noise[at : at + model.batch])

    def rows(self, images: Images) -> Iterator[tuple[str, Images]]:
        yield "", images

    def files(self, images: Images, encoding: str) -> Iterator[tuple[str, bytes]]:
        for frame, image in enumerate(images):
            yield f"{frame:03d}{ENDINGS[encoding]}", encode(image, encoding)
        yield WAY, animation(images)


@dataclass(frozen=True)
class TemperatureSweep:
    """The same samples at each of several temperatures.

    Attributes:
        seed: Of the samples.
        start: Index of the first.
        count: How many.
        temperatures: Each another one.
    """

    seed: int
    start: int
    count: int
    temperatures: tuple[float, ...]

    kind = "temperatures"
    shown = SHEET

    @property
    def total(self) -> int:
        return self.count * len(self.temperatures)

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "temperatures": list(self.temperatures)}

    def batches(self, model: GenerativeModel) -> Iterator[Images]:
        for temperature in self.temperatures:
            for _, images in model.stream(self.seed, self.start, self.count, temperature):
                yield images

    def rows(self, images: Images) -> Iterator[tuple[str, Images]]:
        for temperature, row in zip(self.temperatures, np.split(images, len(self.temperatures)), strict=True):
            yield f"temperature {_short(temperature)}", row

    def files(self, images: Images, encoding: str) -> Iterator[tuple[str, bytes]]:
        names = make("", "", "", count=self.count, start=self.start, kind=encoding)
        rows = np.split(images, len(self.temperatures))
        for temperature, row in zip(self.temperatures, rows, strict=True):
            for at, image in enumerate(row):
                yield f"{_short(temperature)}/{names.file(at).name}", encode(image, encoding)
        yield SHEET, contact_sheet(images, self.count)
        yield ANIMATION, animation(np.stack([sheet(row, min(COLUMNS, self.count), 0) for row in rows]))


def made(sweep: Sweep, model: GenerativeModel, done: Done) -> Images:
    """Return all pictures of a sweep: uint8 [n, height, width, channels].

    Args:
        sweep: Which.
        model: Makes them.
        done: Called with how many more there are. It may raise, to end this.

    Raises:
        ServeError: the device, or the server, fails.
    """
    batches = []
    for images in sweep.batches(model):
        batches.append(images)
        done(len(images))
    return np.concatenate(batches)


def complete(
    sweep: Sweep, model: GenerativeModel, store: Store, encoding: str, replace_other: bool, done: Done
) -> Images:
    """Make a sweep and put all its files into a store; return its pictures.

    Args:
        sweep: Which.
        model: Makes it.
        store: Where.
        encoding: What single pictures are encoded as, one of `encoding.FORMATS`.
        replace_other: Whether a store with other files may be taken over. They stay, unless of the same names.
        done: As in `made`, and with 0 for each file.

    Raises:
        JobError: another job holds the store, it holds something else, or it cannot be written.
        ServeError: the device, or the server, fails.
    """
    facts = {"sweep": sweep.kind, "digest": model.digest, "arithmetic": model.arithmetic, "format": encoding}
    facts |= sweep.facts()

    def begin() -> None:
        if not replace_other:
            _check_ours(facts, store)
        store.put(
            MANIFEST, (json.dumps({"model": model.name, **facts, "versions": versions()}, indent=2) + "\n").encode()
        )

    with store.hold(begin):
        images = made(sweep, model, done)
        for name, data in sweep.files(images, encoding):
            store.put(name, data, lasting=False)  # what a power cut damages, the same command writes again
            done(0)
    return images


def _check_ours(facts: dict[str, Any], store: Store) -> None:
    """Raise JobError where a store holds anything but files of this sweep."""
    mend = "choose another --out, or pass --mix"
    data = store.read(MANIFEST)
    if data is None:
        if any(not is_passing(name) for name in store.walk()):
            raise JobError(f"{store} holds files that are not of a job; {mend}")
        return
    try:
        before = json.loads(data)
        other = [f"{key} {before.get(key, 'none')}, not {facts[key]}" for key in facts if before.get(key) != facts[key]]
    except (ValueError, AttributeError, RecursionError):
        raise JobError(f"{store}/{MANIFEST} is damaged, or not of sample-cli; {mend} to make all anew") from None
    if other:
        raise JobError(f"{store} holds another job's files ({other[0]}); {mend}")


def _short(temperature: float) -> str:
    """Return a temperature in as few characters as tell it from every other one."""
    return repr(temperature).removesuffix(".0")
