"""Proof that a bundle is what it says; what came out is kept in its card."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from export.errors import VerificationError
from export.session import decoder, open_model
from serve import devices, openvino
from serve.bundle import Bundle
from serve.engine import Engine
from serve.half import halved
from serve.model import Decode, Images
from serve.noise import Noise, draw
from serve.text import one_line

BATCHES = (1, 7, 64, 256)
TOLERANCE = 1  # grey levels, of a float32 graph from what it was made of
SIGMA = 8.0  # noise beyond anything that 2^64 samples hold
SEED = 1


def verify(bundle: Bundle, reference: Decode, reference_name: str) -> dict[str, Any]:
    """Check a bundle from all sides; return what came out, JSON-ready.

    Its names, types, axes and operators, and that it is one file, are `serve.bundle.check`'s, which every bundle
    has passed.

    Args:
        bundle: The bundle.
        reference: Makes the images that it has to make.
        reference_name: What the reference is called.

    Raises:
        VerificationError: ONNX's own checker refuses it; fp32 samples differ from the reference's by more than one
            grey level; samples depend on the number of threads; or noise SIGMA times as large gives NaN or infinity.
        EngineError: the engine cannot run it, or its samples depend on what shares their batch.
    """
    model = onnx.load_model_from_string(bundle.data)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's own exceptions share no base
        raise VerificationError(f"ONNX's checker refuses the graph: {one_line(str(error), 300)}") from None
    Engine(bundle, device="cpu")
    noise = draw(SEED, 0, max(BATCHES), bundle.card.noise_size)
    graph = decoder(bundle.data)
    wanted = graph(noise)
    agreement = {str(batch): _agreement(graph, reference, noise[:batch]) for batch in BATCHES}
    worst = max(each["max"] for each in agreement.values())
    if bundle.card.precision == "fp32" and worst > TOLERANCE:
        raise VerificationError(
            f"the graph and {reference_name} differ by {worst} grey levels (at most {TOLERANCE} is allowed); nothing "
            "was written: please report this with the run's config.json"
        )
    for threads in (1, 2):
        if not np.array_equal(decoder(bundle.data, threads)(noise), wanted):
            raise VerificationError(f"samples on {threads} threads are not those on all cores; nothing was written")
    _check_finite(ir.from_proto(model), noise * np.float32(SIGMA))
    return {
        "checker": f"onnx {onnx.__version__}",
        "opset": model.opset_import[0].version,
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "against": reference_name,
        "agreement": agreement,
        "fast": _fast(bundle, noise, wanted),
        "same_bytes_in_batches": [n for n in BATCHES if np.array_equal(graph(noise[:n]), wanted[:n])],
        "same_bytes_on_threads": [1, 2],
        "finite_to_sigma": SIGMA,
    }


def describe(report: dict[str, Any], found: dict[str, Any]) -> str:
    """Return a card's verification, and its difference from fp32, as lines for people."""
    agreement = report["agreement"]
    worst, mean = max(each["max"] for each in agreement.values()), max(each["mean"] for each in agreement.values())
    batches = ", ".join(sorted(agreement, key=int))
    lines = [
        f"  {report['checker']}: well formed, opset {report['opset']}, {sum(report['operators'].values())} nodes, "
        "ONNX's own operators only, one file",
        f"  against {report['against']} in batches of {batches}: at most {worst} grey levels apart, "
        f"{mean:.3g} on average",
        f"  the same bytes in batches of {', '.join(map(str, report['same_bytes_in_batches']))}, and on 1 and 2 "
        f"threads; no NaN or infinity with noise {report['finite_to_sigma']:g} times as large",
    ]
    if report.get("fast"):  # bundles of older versions have none
        each = (
            f"{numbers} {apart['mean']:.3g} on average, {apart['max']} at most"
            for numbers, apart in report["fast"].items()
        )
        lines.append(f"  fast arithmetic against exact, grey levels: {'; '.join(each)}")
    if found:
        text = f"  against fp32: {found['mean']:.3g} grey levels on average, {found['worst']} at most, over "
        text += f"{found['samples']:,} samples"
        if found.keys() >= {"distance", "shift"}:
            text += f"; Frechet distance {found['distance']:.2f}, changed by {found['shift']:+.2%}"
        lines.append(text)
    if "float_layers" in found:
        floats = found["float_layers"]
        lines.append(f"  float layers: {', '.join(floats) or 'none'}")
    return "\n".join(lines)


def _fast(bundle: Bundle, noise: Noise, wanted: Images) -> dict[str, Any]:
    """Return how far fast arithmetic is from exact, by its numbers.

    The float16 of GPUs is rounded to here as there, but summed in float32. bfloat16 takes a processor that has it.
    """
    runs = {devices.FLOAT16: decoder(halved(bundle.data))}
    if openvino.has_bfloat16() and (run := openvino.open_model(bundle.data, arithmetic=openvino.BFLOAT16)):
        runs[openvino.BFLOAT16] = run
    return {numbers: _apart(run(noise), wanted) for numbers, run in runs.items()}


def _agreement(graph: Decode, reference: Decode, noise: Noise) -> dict[str, Any]:
    return _apart(graph(noise), reference(noise))


def _apart(images: Images, wanted: Images) -> dict[str, Any]:
    apart = np.abs(images.astype(np.int16) - wanted)
    return {"max": int(apart.max()), "mean": float(f"{apart.mean():.3g}")}


def _check_finite(model: ir.Model, noise: Noise) -> None:
    """Look at the last float value of the graph: uint8 would hide NaN and infinity."""
    graph = model.graph
    last = graph.outputs[0]
    while last.dtype != ir.DataType.FLOAT:
        maker = last.producer()
        if maker is None or maker.inputs[0] is None:
            raise VerificationError("the images should be made from float values; nothing was written")
        last = maker.inputs[0]
    last.shape = ir.Shape(["batch", None, None, None])
    graph.outputs.clear()
    graph.outputs.append(last)
    (values,) = open_model(model).run(None, {"noise": noise})
    if not np.isfinite(values).all():
        raise VerificationError(
            f"noise {SIGMA:g} times as large as usual gives NaN or infinite values; nothing was written"
        )
