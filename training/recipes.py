"""Every number of a training run, as named frozen dataclasses.

A recipe is data: `train-vae` reads it, freezes it into the run directory's config.json, and nothing
else decides how a run goes.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.errors import RecipeError

RESIZES = ("nearest", "bilinear", "bicubic", "lanczos", "box")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclass(frozen=True)
class Recipe:
    """One two-stage VAE and how to train it. Sizes are in pixels, channels or units."""

    name: str

    # Pictures. `crop` is (top, bottom, left, right) in the original's pixels; 0,0,0,0 takes the
    # largest centred square. Flips double the data: each epoch sees every picture or its mirror image.
    side: int = 32
    channels: int = 3
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    resize: str = "bilinear"
    flip: bool = False

    # Stage 1: the ResNet of Dai & Wipf, figure 1 of the paper.
    num_scale: int = 3
    blocks_per_scale: int = 1
    depth_per_block: int = 2
    base_dim: int = 32
    fc_dim: int = 512
    kernel: int = 3
    latent_dim: int = 64
    l2: float = 0.0
    batch_norm_momentum: float = 0.999

    # Stage 2: dense layers over the latents.
    second_dim: int = 2048
    second_depth: int = 3

    # Training. The learning rate is halved every `halve_every` epochs (Adam, Keras' defaults else).
    batch: int = 100
    epochs: int = 700
    lr: float = 1e-4
    halve_every: int = 250
    epochs2: int = 1400
    lr2: float = 1e-4
    halve_every2: int = 400
    seed: int = 0
    precision: str = "float32"  # what layers compute in; weights, heads and losses are float32 always

    # Seeing it grow: a grid of samples every so many epochs of stage 1.
    sample_every: int = 10

    @property
    def kl_weight(self) -> float:
        """K of stage 1's loss, (2 * side / latent_dim)^2: 1 at 32x32, 4 at 64x64 with 64 latents.

        It keeps CIFAR-10's balance when pixels grow and latents do not (section 5 of the paper).
        """
        return (2 * self.side / self.latent_dim) ** 2

    def __post_init__(self) -> None:
        """Raise RecipeError for a number that no network can be built from."""
        if self.side < 16 or self.side > 256 or self.side & (self.side - 1):
            raise RecipeError(f"side must be a power of two from 16 to 256. Received: {self.side}")
        if self.channels not in (1, 3):
            raise RecipeError(f"channels must be 1 or 3. Received: {self.channels}")
        if self.resize not in RESIZES:
            raise RecipeError(f"resize must be one of {', '.join(RESIZES)}. Received: {self.resize!r}")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision must be one of {', '.join(PRECISIONS)}. Received: {self.precision!r}")
        if self.side >> (self.num_scale - 1) < 2:
            raise RecipeError(
                f"num_scale {self.num_scale} halves side {self.side} below 2 pixels; take a smaller num_scale"
            )
        top, bottom, left, right = self.crop
        if any(self.crop) and not (0 <= top < bottom and 0 <= left < right):
            raise RecipeError(f"crop must be top,bottom,left,right with top < bottom. Received: {self.crop}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("l2", "batch_norm_momentum", "seed", "epochs2") else 1e-12
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < 2**63:
                raise RecipeError(f"{field.name} must be above zero. Received: {value}")
        if self.batch_norm_momentum >= 1:
            raise RecipeError(f"batch_norm_momentum must be below 1. Received: {self.batch_norm_momentum}")

    def set(self, assignments: Iterable[str]) -> Recipe:
        """Return the recipe with `key=value` assignments applied.

        Raises:
            RecipeError: an unknown key, or a value of another type.
        """
        types = typing.get_type_hints(Recipe)
        changes: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or key not in types or key == "name":
                near = difflib.get_close_matches(key, types, n=1)
                hint = f"; did you mean {near[0]}?" if near and near[0] != key else ""
                raise RecipeError(f"--set takes KEY=VALUE with a recipe's setting{hint} Received: {assignment!r}")
            changes[key] = _parse(key, types[key], text)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return dataclasses.asdict(self) | {"crop": list(self.crop)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave.

        Raises:
            RecipeError: settings this version does not know, or lacks.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise RecipeError(f"the recipe was written by another version: it differs in {odd}")
        return cls(**values | {"crop": tuple(values["crop"])})


def _parse(key: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        numbers = tuple(int(part) for part in text.split(","))
        if len(numbers) != 4:
            raise ValueError
        return numbers
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "4 whole numbers a,b,c,d")
        raise RecipeError(f"{key} takes {wanted}. Received: {text!r}") from None


def smoke() -> Recipe:
    """The whole path in seconds: 16x16 pictures, tiny networks, two epochs. For tests."""
    return Recipe(
        name="smoke",
        side=16,
        num_scale=2,
        base_dim=4,
        fc_dim=16,
        latent_dim=8,
        batch_norm_momentum=0.9,
        second_dim=16,
        batch=16,
        epochs=2,
        lr=1e-3,
        halve_every=2,
        epochs2=2,
        lr2=1e-3,
        halve_every2=2,
        sample_every=1,
    )


def cifar10() -> Recipe:
    """CIFAR-10, computed balance: the "computed gamma" row of the paper's CIFAR-10 table.

    The paper's score: FID 53.8 / 80.2 / 68.8 (reconstructed, one stage, two stages; its protocol).
    """
    return Recipe(name="cifar10")


def celeba() -> Recipe:
    """CelebA aligned, cropped to 128x128 and shrunk to 64x64, computed balance: the paper's CelebA table.

    Takes the 178x218 pictures as downloaded. k is 4, and l2 weighs on the convolutions that change size.
    """
    return Recipe(
        name="celeba",
        side=64,
        crop=(45, 173, 25, 153),
        num_scale=4,
        l2=1e-3,
        second_dim=4096,
        epochs=70,
        lr=5e-5,
        halve_every=60,
        epochs2=140,
        lr2=5e-5,
        halve_every2=120,
    )


def faces() -> Recipe:
    """Ten thousand faces or so at 64x64, in minutes on a GPU: what the embedded model was trained with.

    The paper's CelebA network at three quarters of the width, mirror images, and a short schedule: a higher
    rate, halved often, and batch statistics that move faster, since a short run has few steps to settle
    them. `--set precision=mixed_bfloat16` on a GPU; `--set base_dim=16` for patience's sake without one.
    """
    return Recipe(
        name="faces",
        side=64,
        flip=True,
        num_scale=4,
        base_dim=24,
        batch_norm_momentum=0.99,
        second_dim=1024,
        batch=200,
        epochs=150,
        lr=4e-4,
        halve_every=24,
        epochs2=140,
        lr2=4e-4,
        halve_every2=35,
        sample_every=10,
    )


RECIPES = {make.__name__: make for make in (faces, celeba, cifar10, smoke)}


def recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        RecipeError: there is none.
    """
    if name not in RECIPES:
        raise RecipeError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
