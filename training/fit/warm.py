"""A warm start: the weights of a finished run, where they fit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import keras

from training.errors import RunError
from training.model.autoencoder import Autoencoder
from training.record.run import Run


def fingerprint(start: Path) -> str:
    """Return the digest of what a warm start from a run depends on.

    Raises:
        RunError: the run has no finished first stage.
    """
    path = Run(start).network_path(1)
    if not path.exists():
        raise RunError(f"--from takes a finished run. Received: {start}, which has no {path.name}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def warm_start(model: Autoencoder, start: Path) -> str:
    """Give stage 1 the weights of a finished run, layer by layer, and return a line that says which did not fit.

    Raises:
        RunError: there is no such run, or nothing of it fits.
    """
    networks = Run(start).load_networks(1)
    taken, left = 0, []
    for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
        theirs: dict[str, Any] = {layer.name: layer for layer in networks.get_layer(name).layers}
        for layer in network.layers:
            ours: keras.layers.Layer = getattr(layer, "layer", layer)  # within spectral normalisation
            if not ours.weights:
                continue
            weights = theirs[layer.name].get_weights() if layer.name in theirs else []
            if [weight.shape for weight in weights] == [tuple(weight.shape) for weight in ours.weights]:
                ours.set_weights(weights)
                taken += 1
            else:
                left.append(f"{name}/{layer.name}")
    if not taken:
        raise RunError(
            f"no layer of {start} has the shape that this recipe wants; leave --recipe out to take the shapes of --from"
        )
    if left:
        some = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        return f"{taken} layers start from {start}; {len(left)} have other shapes and start from noise: {some}"
    return f"all {taken} layers start from {start}"
