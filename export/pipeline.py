"""From a run directory, or an fp32 bundle, to verified bundles on disk: all of them, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.bundles.compare import Difference, Distance, compare
from export.bundles.pack import pack
from export.bundles.verify import verify
from export.errors import LimitError
from export.exportable import Exportable
from export.passes import optimise
from export.precision.choose import choose
from export.precision.half import halve
from export.session import decoder
from serve.bundle import Bundle
from serve.card import Card
from training.files import replacing

ATTEMPTS = 3  # at a choice of int8 layers within the limit


@dataclass(frozen=True)
class Limits:
    """How far a precision's samples may be from fp32's.

    Attributes:
        mean: The largest mean difference, in grey levels.
        shift: The largest change of the Frechet distance from real pictures, relative to fp32's.
        count: How many samples are compared.
        features: An extractor's file; it goes with `pictures`. Without them no distance is measured.
        pictures: Real pictures, as train-vae takes them.
    """

    mean: float = 1.0
    shift: float = 0.02
    count: int = 10_000
    features: Path | None = None
    pictures: Path | None = None


def export(
    exportable: Exportable,
    outs: Mapping[str, Path],
    store: str = "float32",
    limits: Limits = Limits(),
    say: Callable[[str], None] = lambda line: None,
) -> list[Bundle]:
    """Write a bundle for each precision; nothing is written unless all have passed verification.

    Args:
        exportable: What to export.
        outs: Files to write, by precision.
        store: What float weights are stored in.
        limits: How far a precision's samples may be from fp32's.
        say: Takes progress, a line at a time.

    Raises:
        ConversionError: the graph is not a bundle's.
        VerificationError: a graph computes something else than it should.
        LimitError: a precision's samples are too far from fp32's.
        BundleError: a name is too long with its precision.
        DataError: of the extractor or the real pictures.
    """
    cards = {
        precision: dataclasses.replace(exportable.card, name=name, precision=precision, store=store)
        for precision, name in names(exportable.card.name, list(outs)).items()
    }
    model = exportable.model.clone()
    optimise(model)
    distance = None
    if limits.features and limits.pictures:
        distance = Distance(limits.features, limits.pictures, exportable.card, limits.count)
    bundles = {}
    for precision, card in cards.items():
        graph = model
        if precision != "fp32":
            say(f"{precision}: comparing {limits.count:,} samples with fp32's")
            graph, card = _rounded(model, card, limits, distance)
        bundle = pack(graph, card)
        report = verify(bundle, exportable.reference, exportable.reference_name)
        bundles[precision] = pack(graph, dataclasses.replace(card, verification=report))
    with ExitStack() as stack:
        # All are written before any takes its name.
        parts = {precision: stack.enter_context(replacing(out)) for precision, out in outs.items()}
        for precision, part in parts.items():
            part.write_bytes(bundles[precision].data)
    return list(bundles.values())


def names(name: str, precisions: Sequence[str]) -> dict[str, str]:
    """Return what bundles are called, by precision: by their precision too, where there are several."""
    return {each: name if len(precisions) == 1 else f"{name}-{each}" for each in precisions}


def _rounded(model: ir.Model, card: Card, limits: Limits, distance: Distance | None) -> tuple[ir.Model, Card]:
    """Return a model in its card's precision, and the card with its difference from fp32.

    Raises:
        LimitError: it is beyond the limits.
    """
    exact, aim = decoder(model), limits.mean
    for attempt in reversed(range(ATTEMPTS)):
        graph, floats = (halve(model), None) if card.precision == "fp16" else choose(model, aim)
        bundle = pack(graph, card)
        found = compare(exact, decoder(bundle.data), card.noise_size, limits.count, distance)
        if floats is None or found.mean <= limits.mean or not attempt:
            break
        # The choice was made on fewer samples, which were kinder.
        aim *= 0.95 * limits.mean / found.mean
    _check(found, card.precision, limits)
    difference = {"from": "fp32", **found.to_dict()}
    if floats is not None:
        difference["float_layers"] = floats
    return graph, dataclasses.replace(card, difference=difference)


def _check(found: Difference, precision: str, limits: Limits) -> None:
    if found.mean > limits.mean:
        raise LimitError(
            f"{precision} samples are {found.mean:.2f} grey levels from fp32's on average (at most {limits.mean:g}); "
            "nothing was written; raise --limit-mean if that is no harm"
        )
    if found.shift is not None and abs(found.shift) > limits.shift:
        raise LimitError(
            f"{precision} moves the Frechet distance from real pictures by {found.shift:+.1%} (at most "
            f"{limits.shift:.1%}); nothing was written; raise --limit-fd if that is no harm"
        )
