"""Every setting of a training run, in one frozen dataclass.

A recipe is data: `train-vae` writes it to the run directory's config.json, and nothing else decides how a run
goes. `recipes` has the named ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from training.errors import RecipeError

RESIZES = ("nearest", "bilinear", "bicubic", "lanczos", "box")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
FIRST_STAGES = ("vae", "ae", "rae-l2", "rae-gp", "rae-sn")
BALANCES = ("computed", "learned", "fixed", "annealed")
PRIORS = ("second-stage", "gaussian", "gmm")

_MAY_BE_ZERO = {"limit", "validation", "l2_down", "l2_up", "l2_scale", "batch_norm_momentum", "balance_momentum"}
_MAY_BE_ZERO |= {"kl_weight", "embedding", "regularisation", "seed", "snapshot_every"}
_BELOW_ONE = ("batch_norm_momentum", "balance_momentum", "validation")


@dataclass(frozen=True)
class Recipe:
    """One first stage, the priors fitted to its latents, and how to train them. Sizes: pixels, channels, units."""

    name: str = "custom"

    # Pictures. `crop` is (top, bottom, left, right) in the original's pixels; 0,0,0,0 takes the
    # largest centred square. Flips double the data: each epoch sees every picture or its mirror image.
    # `limit` takes that many pictures, the first ones (0: all); `validation` is the share of them that is held back,
    # chosen by their hash.
    side: int = 32
    channels: int = 3
    crop: tuple[int, ...] = (0, 0, 0, 0)
    resize: str = "bilinear"
    flip: bool = False
    limit: int = 0
    validation: float = 0.0

    # Stage 1: the ResNet of Dai & Wipf, figure 1 of the paper. The l2 weights are those of the encoder's
    # downsampling, of the decoder's upsampling, and of the decoder's scale blocks.
    first_stage: str = "vae"
    num_scale: int = 3
    blocks_per_scale: int = 1
    depth_per_block: int = 2
    base_dim: int = 32
    fc_dim: int = 512
    kernel: int = 3
    latent_dim: int = 64
    l2_down: float = 0.0
    l2_up: float = 0.0
    l2_scale: float = 0.0
    batch_norm_momentum: float = 0.999

    # The balance of a VAE, of stage 1 and of stage 2. `gamma` is what "fixed" and "annealed" hold it at;
    # `kl_weight` is k, or 0 for the paper's (2 * side / latent_dim)^2.
    kl_weight: float = 0.0
    balance: str = "computed"
    balance2: str = "computed"
    balance_momentum: float = 0.99
    balance_minimum: bool = True
    gamma: float = 1.0
    gamma2: float = 1.0
    anneal_epochs: int = 10

    # A deterministic first stage: the weights of |z|^2 / 2 (beta) and of its regulariser (lambda).
    embedding: float = 1e-3
    regularisation: float = 1e-6

    # What latents are sampled from. The standard normal is always there and needs no fitting.
    priors: tuple[str, ...] = ("second-stage",)
    gmm_components: int = 10

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

    # Epochs between two grids of samples, and between two snapshots of stage 1 (0: none).
    sample_every: int = 10
    snapshot_every: int = 0

    @property
    def k(self) -> float:
        """The KL divergence's weight in stage 1's loss: 1 at 32x32, 4 at 64x64 with 64 latents.

        It keeps CIFAR-10's balance when pixels grow and latents do not (section 4.2 of the paper).
        """
        return self.kl_weight or (2 * self.side / self.latent_dim) ** 2

    def __post_init__(self) -> None:
        """Raise RecipeError for a setting that no run can be made from."""
        if self.side < 16 or self.side > 256 or self.side & (self.side - 1):
            raise RecipeError(f"side must be a power of two from 16 to 256. Received: {self.side}")
        if self.channels not in (1, 3):
            raise RecipeError(f"channels must be 1 or 3. Received: {self.channels}")
        for key, known in _CHOICES.items():
            value = getattr(self, key)
            for each in value if isinstance(value, tuple) else (value,):
                if each not in known:
                    raise RecipeError(f"{key} takes {', '.join(known)}. Received: {each!r}")
        if len(set(self.priors)) < len(self.priors):
            raise RecipeError(f"priors names one twice. Received: {','.join(self.priors)}")
        if self.side >> (self.num_scale - 1) < 2:
            raise RecipeError(
                f"num_scale {self.num_scale} halves side {self.side} below 2 pixels; take a smaller num_scale"
            )
        if len(self.crop) != 4:
            raise RecipeError(f"crop takes 4 whole numbers top,bottom,left,right. Received: {self.crop}")
        top, bottom, left, right = self.crop
        if any(self.crop) and not (0 <= top < bottom and 0 <= left < right):
            raise RecipeError(f"crop must be top,bottom,left,right with top < bottom. Received: {self.crop}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                least = 0 if field.name in _MAY_BE_ZERO else 1e-12
                if not least <= value < 2**63:
                    raise RecipeError(f"{field.name} must be above zero. Received: {value}")
        if self.gmm_components < 2:
            raise RecipeError(
                f"gmm_components must be 2 or more (one is prior gaussian). Received: {self.gmm_components}"
            )
        for key in _BELOW_ONE:
            if getattr(self, key) >= 1:
                raise RecipeError(f"{key} must be below 1. Received: {getattr(self, key)}")
        if self.seed >= 2**32:  # what scikit-learn takes, and Keras
            raise RecipeError(f"seed must be below 2**32. Received: {self.seed}")

    def set(self, assignments: Iterable[str]) -> Recipe:
        """Return the recipe with `key=value` assignments applied.

        Raises:
            RecipeError: an unknown key, a value of another type, or a setting that this recipe does not read.
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
        changed = dataclasses.replace(self, **changes)
        for key in changes:
            if key in _READ_WITH and not _READ_WITH[key][1](changed):
                raise RecipeError(f"{key} changes nothing in this recipe: it counts with {_READ_WITH[key][0]}")
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave.

        Raises:
            RecipeError: there are settings that this version does not know, or some are missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise RecipeError(f"the recipe was written by another version: it differs in {odd}")
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**frozen)


_CHOICES = {
    "resize": RESIZES,
    "precision": PRECISIONS,
    "first_stage": FIRST_STAGES,
    "balance": BALANCES,
    "balance2": BALANCES,
    "priors": PRIORS,
}


def _balanced(recipe: Recipe) -> set[str]:
    """Return the balance policies that the recipe's stages use."""
    first = {recipe.balance} if _variational(recipe) else set()
    return first | ({recipe.balance2} if _second(recipe) else set())


def _variational(recipe: Recipe) -> bool:
    return recipe.first_stage == "vae"


def _second(recipe: Recipe) -> bool:
    return "second-stage" in recipe.priors


# When a setting has an effect, in words and as a test: `gamma`, for example, has one only where the balance is fixed
# or annealed. --set refuses a setting without effect, as whoever sets it expects one; named recipes may hold some.
_Reads = tuple[str, Callable[[Recipe], bool]]
_SECOND: _Reads = ("second-stage among priors", _second)
_COMPUTED: _Reads = ("a stage whose balance is computed", lambda recipe: "computed" in _balanced(recipe))
_READ_WITH: dict[str, _Reads] = {
    "balance": ("first_stage=vae", _variational),
    "kl_weight": ("first_stage=vae", _variational),
    "gamma": (
        "first_stage=vae and balance=fixed or annealed",
        lambda recipe: _variational(recipe) and recipe.balance in ("fixed", "annealed"),
    ),
    "gamma2": (
        "second-stage among priors and balance2=fixed or annealed",
        lambda recipe: _second(recipe) and recipe.balance2 in ("fixed", "annealed"),
    ),
    "balance_momentum": _COMPUTED,
    "balance_minimum": _COMPUTED,
    "anneal_epochs": ("a stage whose balance is annealed", lambda recipe: "annealed" in _balanced(recipe)),
    "embedding": ("first_stage=rae-l2, rae-gp or rae-sn", lambda recipe: recipe.first_stage.startswith("rae-")),
    "regularisation": ("first_stage=rae-l2 or rae-gp", lambda recipe: recipe.first_stage in ("rae-l2", "rae-gp")),
    "l2_down": ("num_scale of 2 or more", lambda recipe: recipe.num_scale > 1),
    "gmm_components": ("gmm among priors", lambda recipe: "gmm" in recipe.priors),
    **dict.fromkeys(("balance2", "second_dim", "second_depth", "epochs2", "lr2", "halve_every2"), _SECOND),
}


def _parse(key: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        (item, _) = typing.get_args(kind)  # tuple[item, ...]
        return tuple(item(part.strip()) for part in text.split(",") if part.strip())
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "whole numbers a,b,c,d")
        raise RecipeError(f"{key} takes {wanted}. Received: {text!r}") from None
