"""Every setting of a training run, in one frozen dataclass.

A recipe is data: `train-vae` writes it to the run directory's config.json, and nothing else decides how a run
goes. `recipes` has the named ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.errors import RecipeError
from training.settings import Counts, Setting, setting, settings

RESIZES = ("nearest", "bilinear", "bicubic", "lanczos", "box")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
FIRST_STAGES = ("vae", "ae", "rae-l2", "rae-gp", "rae-sn")
BALANCES = ("computed", "learned", "fixed", "annealed")
PRIORS = ("second-stage", "gaussian", "gmm")
WORDS: dict[Any, str] = {  # for what a setting of each type takes
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    tuple[int, ...]: "whole numbers a,b,c,d",
    tuple[str, ...]: "words a,b",
}
BEST_FIRST = ("second-stage", "gmm", "gaussian", "normal")  # the first that a run has is its default


def _variational(recipe: Recipe) -> bool:
    return recipe.first_stage == "vae"


def _second(recipe: Recipe) -> bool:
    return "second-stage" in recipe.priors


def _balanced(recipe: Recipe) -> set[str]:
    """Return the balance policies that the recipe's stages use."""
    first = {recipe.balance} if _variational(recipe) else set()
    return first | ({recipe.balance2} if _second(recipe) else set())


# When settings count. --set refuses a setting without effect, as whoever sets it expects one; named recipes may
# hold some.
_VAE: Counts = ("first_stage=vae", _variational)
_SECOND: Counts = ("second-stage among priors", _second)
_COMPUTED: Counts = ("a stage whose balance is computed", lambda recipe: "computed" in _balanced(recipe))
_ANNEALED: Counts = ("a stage whose balance is annealed", lambda recipe: "annealed" in _balanced(recipe))
_GAMMA: Counts = (
    "first_stage=vae and balance=fixed or annealed",
    lambda recipe: _variational(recipe) and recipe.balance in ("fixed", "annealed"),
)
_GAMMA2: Counts = (
    "second-stage among priors and balance2=fixed or annealed",
    lambda recipe: _second(recipe) and recipe.balance2 in ("fixed", "annealed"),
)
_RAE: Counts = ("first_stage=rae-l2, rae-gp or rae-sn", lambda recipe: recipe.first_stage.startswith("rae-"))
_PENALTY: Counts = ("first_stage=rae-l2 or rae-gp", lambda recipe: recipe.first_stage in ("rae-l2", "rae-gp"))
_SCALES: Counts = ("num_scale of 2 or more", lambda recipe: recipe.num_scale > 1)
_SHARP: Counts = ("epochs3 above 0", lambda recipe: recipe.epochs3 > 0)
_GMM: Counts = ("gmm among priors", lambda recipe: "gmm" in recipe.priors)


@dataclass(frozen=True)
class Recipe:
    """One first stage, the priors fitted to its latents, and how to train them. docs/settings.md has all settings.

    The defaults are the paper's for CIFAR-10. A setting that is added later has a default that changes no older run.
    """

    name: str = "custom"

    side: int = setting(32, "pictures", "pixels", "width and height that pictures are made: a power of two, 16 to 256")
    channels: int = setting(3, "pictures", "", "3 for colour, 1 for grey")
    crop: tuple[int, ...] = setting(
        (0, 0, 0, 0),
        "pictures",
        "the original's pixels",
        "top,bottom,left,right of the part to use; 0,0,0,0 takes the largest centred square",
        zero=True,
    )
    resize: str = setting("bilinear", "pictures", "", "how pictures are resized", choices=RESIZES)
    flip: bool = setting(False, "pictures", "", "whether mirror images belong to the data; not for text or digits")
    limit: int = setting(0, "pictures", "pictures", "use only the first so many; 0 uses all", zero=True)
    validation: float = setting(
        0.0, "pictures", "share", "held back and measured, chosen by each picture's hash", zero=True, below_one=True
    )

    first_stage: str = setting("vae", "first", "", "the kind of autoencoder", choices=FIRST_STAGES)
    num_scale: int = setting(3, "first", "scales", "sizes that the encoder works at; each halves the side")
    blocks_per_scale: int = setting(1, "first", "blocks", "residual blocks at each size")
    depth_per_block: int = setting(2, "first", "layers", "convolutions in a block")
    base_dim: int = setting(
        32, "first", "channels", "width at full size; half of it takes about a third of the time, and blurs more"
    )
    fc_dim: int = setting(512, "first", "units", "width of the encoder's dense layers")
    kernel: int = setting(3, "first", "pixels", "width and height of the convolutions")
    latent_dim: int = setting(64, "first", "latents", "numbers that a picture is encoded as")
    l2_down: float = setting(
        0.0, "first", "weight", "l2 regularisation of the encoder's downsampling", zero=True, counts=_SCALES
    )
    l2_up: float = setting(0.0, "first", "weight", "l2 regularisation of the decoder's upsampling", zero=True)
    l2_scale: float = setting(0.0, "first", "weight", "l2 regularisation of the decoder's blocks", zero=True)
    batch_norm_momentum: float = setting(
        0.999,
        "first",
        "share",
        "what a step keeps of batch norm's running statistics: they follow the last 1 / (1 - momentum) steps, so a "
        "run of a few thousand steps wants .99",
        zero=True,
        below_one=True,
    )

    kl_weight: float = setting(
        0.0,
        "balance",
        "",
        "k, the KL divergence's weight; 0 is the paper's (2 side / latent_dim)^2",
        zero=True,
        counts=_VAE,
    )
    balance: str = setting("computed", "balance", "", "stage 1's policy", choices=BALANCES, counts=_VAE)
    balance2: str = setting("computed", "balance", "", "stage 2's policy", choices=BALANCES, counts=_SECOND)
    balance_momentum: float = setting(
        0.99,
        "balance",
        "share",
        "what a step keeps of the running error that gamma is computed from: it follows the last 1 / (1 - momentum) "
        "steps",
        zero=True,
        below_one=True,
        counts=_COMPUTED,
    )
    balance_minimum: bool = setting(True, "balance", "", "whether gamma may only fall", counts=_COMPUTED)
    gamma: float = setting(1.0, "balance", "deviations", "stage 1's gamma where it is held", counts=_GAMMA)
    gamma2: float = setting(1.0, "balance", "deviations", "stage 2's gamma where it is held", counts=_GAMMA2)
    anneal_epochs: int = setting(
        10, "balance", "epochs", "until the KL divergence has its whole weight", counts=_ANNEALED
    )

    embedding: float = setting(1e-3, "deterministic", "weight", "beta, of |z|^2 / 2", zero=True, counts=_RAE)
    regularisation: float = setting(
        1e-6, "deterministic", "weight", "lambda, of the regulariser", zero=True, counts=_PENALTY
    )

    priors: tuple[str, ...] = setting(
        ("second-stage",),
        "priors",
        "",
        "what latents are sampled from; the standard normal is always there, and needs no fitting",
        choices=PRIORS,
    )
    gmm_components: int = setting(10, "priors", "Gaussians", "in the mixture, 2 or more", counts=_GMM)
    second_dim: int = setting(2048, "priors", "units", "width of stage 2's dense layers", counts=_SECOND)
    second_depth: int = setting(3, "priors", "layers", "dense layers in stage 2's encoder and decoder", counts=_SECOND)

    batch: int = setting(100, "training", "pictures", "in a minibatch; fewer make more steps of the same pictures")
    epochs: int = setting(700, "training", "epochs", "of stage 1")
    epoch_steps: int = setting(
        0, "training", "steps", "minibatches in an epoch of stage 1; 0 makes it one pass over the pictures", zero=True
    )
    warm_up: int = setting(
        0,
        "training",
        "steps",
        "over which lr rises from nothing: a rate that is high for the first steps can make the KL divergence explode",
        zero=True,
    )
    lr: float = setting(1e-4, "training", "", "learning rate of stage 1 (Adam)")
    halve_every: int = setting(250, "training", "epochs", "between two halvings of lr")
    batch2: int = setting(
        0, "training", "latents", "in a minibatch of stage 2; 0 takes batch", zero=True, counts=_SECOND
    )
    epochs2: int = setting(1400, "training", "epochs", "of stage 2", counts=_SECOND)
    epoch_steps2: int = setting(
        0, "training", "steps", "minibatches in an epoch of stage 2; 0 makes it one pass", zero=True, counts=_SECOND
    )
    lr2: float = setting(1e-4, "training", "", "learning rate of stage 2 (Adam)", counts=_SECOND)
    halve_every2: int = setting(400, "training", "epochs", "between two halvings of lr2", counts=_SECOND)
    seed: int = setting(0, "training", "", "of the weights, the order of the pictures and the noise", zero=True)
    precision: str = setting(
        "float32",
        "training",
        "",
        "what stage 1's layers compute in; weights and losses are float32",
        choices=PRECISIONS,
    )

    epochs3: int = setting(
        0, "sharpening", "epochs", "of sharpening stage 1's decoder, after the priors; 0 leaves it out", zero=True
    )
    epoch_steps3: int = setting(
        0, "sharpening", "steps", "minibatches in an epoch of it; 0 makes it one pass", zero=True, counts=_SHARP
    )
    batch3: int = setting(0, "sharpening", "pictures", "in a minibatch of it; 0 takes batch", zero=True, counts=_SHARP)
    lr3: float = setting(2e-4, "sharpening", "", "learning rate of decoder and critic (Adam)", counts=_SHARP)
    halve_every3: int = setting(40, "sharpening", "epochs", "between two halvings of lr3", counts=_SHARP)
    critic_dim: int = setting(32, "sharpening", "channels", "width of the critic at full size", counts=_SHARP)
    feature_matching: float = setting(
        2.0,
        "sharpening",
        "weight",
        "of the distance between a picture and its reconstruction in the critic's features",
        zero=True,
        counts=_SHARP,
    )
    pixel_matching: float = setting(
        0.5,
        "sharpening",
        "weight",
        "of the squared error, in units of that of stage 1's reconstructions",
        zero=True,
        counts=_SHARP,
    )
    averaging: float = setting(
        0.999,
        "sharpening",
        "share",
        "what a step keeps of the average of the decoder's weights, which is what is kept of them",
        zero=True,
        below_one=True,
        counts=_SHARP,
    )

    sample_every: int = setting(10, "kept", "epochs", "between two grids of samples")
    snapshot_every: int = setting(
        0, "kept", "epochs", "between two copies of stage 1, for figure 2; 0 keeps none", zero=True
    )

    @property
    def k(self) -> float:
        """The KL divergence's weight in stage 1's loss: 1 at 32x32, 4 at 64x64 with 64 latents.

        It keeps CIFAR-10's balance when pixels grow and latents do not (section 4.2 of the paper).
        """
        return self.kl_weight or (2 * self.side / self.latent_dim) ** 2

    def __post_init__(self) -> None:
        """Raise RecipeError for a setting that no run can be made from."""
        for key, kind in _types().items():
            if not _fits(getattr(self, key), kind):
                raise RecipeError(f"{key} takes {WORDS[kind]}. Received: {getattr(self, key)!r}")
        if self.side < 16 or self.side > 256 or self.side & (self.side - 1):
            raise RecipeError(f"side must be a power of two from 16 to 256. Received: {self.side}")
        if self.channels not in (1, 3):
            raise RecipeError(f"channels must be 1 or 3. Received: {self.channels}")
        for key, each in settings(self).items():
            _check(key, getattr(self, key), each)
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
        if self.gmm_components < 2:
            raise RecipeError(
                f"gmm_components must be 2 or more (one is prior gaussian). Received: {self.gmm_components}"
            )
        if self.seed >= 2**32:  # what scikit-learn takes, and Keras
            raise RecipeError(f"seed must be below 2**32. Received: {self.seed}")

    def set(self, assignments: Iterable[str]) -> Recipe:
        """Return the recipe with `key=value` assignments applied.

        Raises:
            RecipeError: an unknown key, a value of another type, or a setting that this recipe does not read.
        """
        changes = parse(assignments)
        changed = dataclasses.replace(self, **changes)
        for key in changes:
            words, counts = settings(changed)[key].counts
            if not counts(changed):
                raise RecipeError(f"{key} changes nothing in this recipe: it counts with {words}")
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def effective(self) -> dict[str, Any]:
        """Return those of its values that count: two recipes of which these are the same train the same run."""
        return {key: getattr(self, key) for key, each in settings(self).items() if each.counts[1](self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` gave.

        Raises:
            RecipeError: there are settings that this version does not know. Those that are missing have their defaults.
        """
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise RecipeError(f"the recipe was written by another version: it has {', '.join(sorted(unknown))}")
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**frozen)


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value` assignments, whichever recipe they are for.

    Raises:
        RecipeError: an unknown key, a value of another type, or one that its setting never takes.
    """
    types, described = _types(), settings(Recipe())
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or key not in types or key == "name":
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != key else ""
            raise RecipeError(f"--set takes KEY=VALUE with a recipe's setting{hint} Received: {assignment!r}")
        values[key] = _parse(key, types[key], text)
        if key in described:
            _check(key, values[key], described[key])
    return values


def _check(key: str, value: Any, known: Setting) -> None:
    """Raise RecipeError for a value that its setting does not take."""
    for each in value if isinstance(value, tuple) else (value,):
        if known.choices and each not in known.choices:
            raise RecipeError(f"{key} takes {', '.join(known.choices)}. Received: {each!r}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not (0 if known.zero else 1e-12) <= value < 2**63:
            least = "zero or more" if known.zero else "above zero"
            raise RecipeError(f"{key} must be {least}, and below 2**63. Received: {value}")
        if known.below_one and value >= 1:
            raise RecipeError(f"{key} must be below 1. Received: {value}")


@functools.cache  # as each hint is compiled anew, for every recipe that is made
def _types() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is of a setting's type; a whole number is a number too, and a truth value is neither."""
    if kind is float:
        return type(value) in (int, float)
    if kind in (bool, int, str):
        return type(value) is kind
    return isinstance(value, tuple) and all(_fits(each, _item(kind)) for each in value)


def _item(kind: Any) -> Any:
    """Return the type of the items of tuple[item, ...]."""
    return typing.get_args(kind)[0]


def _parse(key: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        return tuple(_item(kind)(part.strip()) for part in text.split(",") if part.strip())
    except (KeyError, ValueError):
        raise RecipeError(f"{key} takes {WORDS[kind]}. Received: {text!r}") from None
