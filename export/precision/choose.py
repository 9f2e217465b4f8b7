"""Chooses which layers compute in int8: as much of the work as a limit on the images' error allows.

Each layer alone is quantised, and the images are compared. The errors of layers are nearly independent, so that their
squares add: layers are taken in the order of squared error for the work they save, until the sum reaches the aim.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from export.errors import LimitError
from export.passes.cost import multiplications, size
from export.passes.graph import constant, noise_size
from export.precision.quantise import SEED, calibrate, candidates, quantise
from export.session import decoder
from serve.noise import draw

ALONE, TOGETHER = 64, 256  # samples that measure one layer alone, and a choice of layers
AIM = 0.9  # of the limit, as the final comparison is on other samples
READ = 64  # reading a weight takes as long as so many multiplications


def choose(model: ir.Model, limit: float) -> tuple[ir.Model, list[str]]:
    """Return a model with layers in int8, and the names of those that stay float.

    Args:
        model: float32, optimised.
        limit: Mean difference of its pictures in grey levels.

    Raises:
        LimitError: not even one layer can be in int8.
    """
    ranges, layers = calibrate(model), candidates(model.graph)
    noise = draw(SEED, 2**32, TOGETHER, noise_size(model.graph))
    wanted = decoder(model)(noise).astype(np.int16)

    def error(names: Collection[str], samples: int = TOGETHER) -> float:
        images = decoder(quantise(model, ranges, names))(noise[:samples])
        return float(np.abs(images - wanted[:samples]).mean())

    names = [str(node.name) for node in layers]
    if error(names) > AIM * limit:
        none = error([], ALONE) ** 2  # the error of keeping weights in bytes
        squares = {name: max(error([name], ALONE) ** 2 - none, 0.0) for name in names}
        work = {str(node.name): _work(node) for node in layers}
        order = sorted(names, key=lambda name: squares[name] / work[name])
        sums = none + np.cumsum([squares[name] for name in order])
        start = int(np.searchsorted(sums, (AIM * limit) ** 2))
        names = order[:start]
        while names and error(names) > AIM * limit:
            names.pop()
        # The errors are not quite independent: a few more layers may fit.
        for name in order[start:]:
            if squares[name] <= (AIM * limit) ** 2 and error([*names, name]) <= AIM * limit:
                names.append(name)
    if not names:
        raise LimitError(f"no layer can be int8 within a mean of {limit:g} grey levels; raise --limit-mean")
    return quantise(model, ranges, names), [str(node.name) for node in layers if node.name not in names]


def _work(node: ir.Node) -> int:
    """Return a layer's multiplications per sample, and what its weights cost to read."""
    kernel = constant(node.inputs[1])
    products = multiplications(node, 1) or size(node.outputs[0], 1)  # a normalisation multiplies each value once
    assert kernel is not None
    assert products is not None
    return products + kernel.size * READ
