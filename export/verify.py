"""Proof that a bundle computes what Keras computes, through the engine that will run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from export.errors import VerificationError
from serve.bundle import Bundle
from serve.engine import Engine
from serve.noise import draw

BATCHES = (1, 7, 64)
TOLERANCE = 1  # grey levels


@dataclass(frozen=True)
class Agreement:
    """How far a bundle is from Keras, in grey levels over all values compared.

    Attributes:
        worst: The largest difference.
        mean: The mean difference.
        batches: Batch sizes compared.
    """

    worst: int
    mean: float
    batches: Sequence[int]


def verify(chain: keras.Model, bundle: Bundle, batches: Sequence[int] = BATCHES) -> Agreement:
    """Compare a bundle with the Keras model it was made from, on noise of the contract.

    Raises:
        VerificationError: a value differs by more than one grey level.
    """
    engine = Engine(bundle, device="cpu")
    differences = []
    for batch in batches:
        noise = draw(1, batch, batch, bundle.card.noise_size)
        keras_images = keras.ops.convert_to_numpy(chain(noise, training=False)).astype(np.int16)
        differences.append(np.abs(engine.run(noise).astype(np.int16) - keras_images).ravel())
    every = np.concatenate(differences)
    agreement = Agreement(int(every.max()), float(every.mean()), tuple(batches))
    if agreement.worst > TOLERANCE:
        raise VerificationError(
            f"the graph and Keras differ by {agreement.worst} grey levels (at most {TOLERANCE} is allowed); "
            "nothing was written: please report this with the run's config.json"
        )
    return agreement
