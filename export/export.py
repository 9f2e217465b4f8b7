"""From a run directory to a verified bundle on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from export.chain import build
from export.convert import OPSET, convert
from export.verify import Agreement, verify
from serve.bundle import Bundle, Card, check
from training.run import Run, replacing


@dataclass(frozen=True)
class Options:
    """What to export and what the card says; the command's options of the same names."""

    name: str
    prior: str = "second-stage"
    normalise: str = "scalar"
    store: str = "float32"
    dataset: str = ""
    licence: str = ""
    notes: str = ""


def export(run_path: Path, out: Path, options: Options) -> tuple[Bundle, Agreement]:
    """Write a bundle; nothing is left behind unless it passed verification.

    Raises:
        RunError: the run is not finished or cannot be read.
        ConversionError: the graph is not a bundle's.
        VerificationError: the graph computes something else than Keras.
    """
    run = Run(run_path)
    recipe = run.recipe
    chain, normalisation = build(run, options.prior, options.normalise)
    card = Card(
        name=options.name,
        image_shape=(recipe.side, recipe.side, recipe.channels),
        noise_size=chain.input_shape[-1],
        latent_size=recipe.latent_dim,
        prior=options.prior,
        normalisation=normalisation.card(),
        precision=f"float32, weights stored as {options.store}",
        recipe=recipe.to_dict(),
        dataset={"description": options.dataset, **run.config["data"]},
        licence=options.licence,
        notes=options.notes,
        # A row for each latent is for the run directory, not for every copy of the model.
        metrics=[{key: value for key, value in each.items() if key != "per_latent"} for each in run.metrics],
        producers={
            "opset": str(OPSET),
            **{package: version(package) for package in ("balanced-vae", "keras", "tensorflow", "tf2onnx", "onnx-ir")},
        },
    )
    data = convert(chain, card, options.store)
    bundle = Bundle(data, check(data), hashlib.sha256(data).hexdigest())
    agreement = verify(chain, bundle)
    with replacing(out) as part:
        part.write_bytes(data)
    return bundle, agreement
