"""What can be exported: a run directory, or a bundle that is wanted in another precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.bundles.compare import Maker
from export.bundles.pack import unpack
from export.errors import ExportError
from serve import bundle
from serve.card import MOST_CARD, Card
from serve.engine import Engine, Images
from serve.noise import Noise

PACKAGES = ("balanced-vae", "keras", "tensorflow", "tf2onnx", "onnx-ir")


@dataclass(frozen=True)
class Source:
    """A chain as ONNX, before any pass, and what it has to compute.

    Attributes:
        model: float32.
        card: What the bundle says of itself; precision, difference and verification are still to come.
        original: Makes the pictures that the graph's are compared with.
        what: Its name.
    """

    model: ir.Model
    card: Card
    original: Maker
    what: str


def from_run(
    path: Path,
    prior: str,
    normalise: str,
    with_latents: bool,
    told: Mapping[str, str],
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Return a finished run as a source.

    Args:
        path: The run directory.
        prior: One of the run's priors.
        normalise: Latent normalisation of second-stage samples, as `chain.build` takes it.
        with_latents: Whether latents come out beside images.
        told: The card's name, and dataset, licence and notes where they are told.
        say: Told what the card leaves out.

    Raises:
        RunError: the run is not finished, cannot be read, or has no such prior.
        BundleError: something that was told is nothing for a card.
        ConversionError: the graph has other inputs or outputs than a bundle.
    """
    # TensorFlow takes seconds to import, and bundles need none of it. The run comes first: its package sets what
    # TensorFlow reads when it is imported.
    from training.record.run import Run

    run = Run(path)
    recipe = run.recipe

    from export.chain import build
    from export.convert import convert

    chain, normalisation = build(run, prior, normalise, with_latents=with_latents)
    card = Card(
        name=told["name"],
        image_shape=(recipe.side, recipe.side, recipe.channels),
        noise_size=chain.input_shape[-1],
        latent_size=recipe.latent_dim,
        prior=prior,
        normalisation=normalisation.card(),
        precision="fp32",
        recipe=recipe.to_dict(),
        dataset={"description": told.get("dataset", ""), **run.config["data"]},
        licence=told.get("licence", ""),
        notes=told.get("notes", ""),
        metrics=_measured(run.metrics, say),
        producers={package: version(package) for package in PACKAGES},
    )

    def original(noise: Noise) -> Images:
        outputs = chain(noise, training=False)
        images: Images = (outputs[0] if with_latents else outputs).numpy()
        return images

    return Source(convert(chain), card, original, "Keras")


def from_bundle(path: Path, told: Mapping[str, str]) -> Source:
    """Return a bundle as a source. What is told goes before what its card has.

    Raises:
        BundleError: it cannot be read, or is none.
        EngineError: it cannot be run here.
        ExportError: it was rounded already.
    """
    found = bundle.load(path)
    card = found.card
    if card.precision in ("fp16", "int8"):
        raise ExportError(f"{path} is {card.precision} already; export the run again, or its fp32 bundle")
    dataset = {"description": told["dataset"]} if told.get("dataset") else {}
    card = dataclasses.replace(
        card,
        name=told["name"],
        dataset=card.dataset | dataset,
        licence=told.get("licence") or card.licence,
        notes=told.get("notes") or card.notes,
        producers=card.producers | {package: version(package) for package in ("balanced-vae", "onnx-ir")},
    )
    return Source(unpack(found), card, Engine(found, device="cpu").run, "the bundle")


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
