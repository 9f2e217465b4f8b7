"""What can be exported: a run directory, or a bundle that is wanted in another precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.bundles.pack import unpack
from export.errors import ExportError
from serve import bundle
from serve.card import MOST_CARD, Card
from serve.engine import Engine
from serve.model import Decode, Images
from serve.noise import Noise
from training.errors import RunError
from training.recipe import BEST_FIRST

PACKAGES = ("balanced-vae", "keras", "tensorflow", "tf2onnx", "onnx-ir")


@dataclass(frozen=True)
class Exportable:
    """A chain as ONNX, before any pass, and what it has to compute.

    Attributes:
        model: float32.
        card: What the bundle says of itself; precision, difference and verification are still to come.
        reference: Makes the images that the bundle's are compared with.
        reference_name: What the reference is called.
    """

    model: ir.Model
    card: Card
    reference: Decode
    reference_name: str


def prior_of(path: Path, wanted: str | None = None) -> str:
    """Return the prior to export a run with: the one that is wanted, or else the first of BEST_FIRST that the run has.

    Raises:
        RunError: there is no run, or it has no such prior.
    """
    # TensorFlow takes seconds to import, and bundles need none of it.
    from training.record.run import Run

    run = Run(path)
    # A prior of the recipe whose file is missing belongs to an unfinished run: no other may take its place unsaid.
    here = {*run.recipe.priors, *run.priors}
    has = [name for name in BEST_FIRST if name in here]
    if wanted and wanted not in has:
        raise RunError(f"{path} has no prior {wanted}; pass --prior with one that it has: {', '.join(has)}")
    return wanted or has[0]


def from_run(
    path: Path,
    name: str,
    prior: str | None = None,
    normalise: str = "scalar",
    with_latents: bool = False,
    say: Callable[[str], None] = lambda line: None,
    *,
    plain: bool = False,
    dataset: str = "",
    licence: str = "",
    notes: str = "",
) -> Exportable:
    """Return what a finished run exports.

    Args:
        path: The run directory.
        name: What the model is served as.
        prior: One of the run's priors; None means the first of BEST_FIRST that it has.
        normalise: Latent normalisation of second-stage samples, as `chain.build` takes it.
        with_latents: Whether latents come out beside images.
        say: Takes a line about measurements that the card leaves out.
        plain: Whether to leave sharpening out.
        dataset: For the card: what the model was trained on.
        licence: For the card: under what terms the model may be used.
        notes: For the card: anything a user should know.

    Raises:
        RunError: the run is not finished, cannot be read, or has no such prior.
        BundleError: the card does not take one of the texts.
        ConversionError: the graph has other inputs or outputs than a bundle.
    """
    # The run comes first: its package sets what TensorFlow reads when it is imported.
    from training.record.run import Run

    run = Run(path)
    recipe, prior = run.recipe, prior_of(path, prior)

    from export.chain import build
    from export.convert import convert
    from training.model.latents import infer

    chain, normalisation = build(run, prior, normalise, with_latents=with_latents, plain=plain)
    sharpened = bool(recipe.epochs3) and not plain
    if not sharpened:
        recipe = dataclasses.replace(recipe, epochs3=0)
    card = Card(
        name=name,
        image_shape=(recipe.side, recipe.side, recipe.channels),
        noise_size=chain.input_shape[-1],
        latent_size=recipe.latent_dim,
        prior=prior,
        normalisation=normalisation.card(),
        precision="fp32",
        recipe=recipe.to_dict(),
        dataset={"description": dataset, **run.config["data"]},
        licence=licence,
        notes=notes,
        metrics=_measured([each for each in run.metrics if ("decoder" in each) == sharpened], say),
        producers={package: version(package) for package in PACKAGES},
    )

    def reference(noise: Noise) -> Images:
        images: Images = infer(chain, noise)[0]
        return images

    return Exportable(convert(chain), card, reference, "Keras")


def from_bundle(path: Path, name: str, *, dataset: str = "", licence: str = "", notes: str = "") -> Exportable:
    """Return what an fp32 bundle exports. A name or text given here replaces its card's.

    Raises:
        BundleError: it cannot be read, or is no bundle.
        EngineError: it cannot be run here.
        ExportError: it is fp16 or int8 already.
    """
    found = bundle.load(path)
    card = found.card
    if card.precision in ("fp16", "int8"):
        raise ExportError(f"{path} is {card.precision} already; export the run again, or its fp32 bundle")
    card = dataclasses.replace(
        card,
        name=name,
        dataset=card.dataset | ({"description": dataset} if dataset else {}),
        licence=licence or card.licence,
        notes=notes or card.notes,
        producers=card.producers | {package: version(package) for package in ("balanced-vae", "onnx-ir")},
    )
    return Exportable(unpack(found), card, Engine(found, device="cpu").decode, "the bundle")


def _measured(records: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the measurements of this very model, the newest of them where not all have room in its card."""
    # A row for each latent, and snapshots along the way, are for the run directory, not for every copy of the model.
    ours = [
        {key: value for key, value in each.items() if key != "per_latent"} for each in records if "epoch" not in each
    ]
    kept, room = len(ours), MOST_CARD // 2
    for number, each in enumerate(reversed(ours)):
        room -= len(json.dumps(each))
        if room < 0:
            kept = number
            say(f"the card has room for the {kept} newest of {len(ours)} measurements; the run keeps all")
            break
    return ours[len(ours) - kept :]
