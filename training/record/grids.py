"""Grids of pictures: samples, reconstructions, interpolations; and every figure of a finished run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from PIL import Image

from training.data.dataset import Splits
from training.data.images import sheet_mark
from training.files import replacing
from training.record import plots
from training.record.run import Run
from training.types import Float32Array, Float64Array, IndexArray, UInt8Array

PAIRS = 64  # pictures shown beside their reconstructions
ROWS, STEPS = 8, 10  # interpolations, and pictures in each, both ends included


def draw(run: Run, networks: keras.Model, splits: Splits) -> None:
    """Draw a finished run's figures, and what stage 1 makes of the data.

    figures/history.png: each stage's terms, balance and latents over the epochs.
    figures/figure5.png: how many latents stage 1 uses (figures 5 to 7 are the paper's, of variational stages).
    figures/figure6.png, figure7.png: each latent's variance along the first epoch and along all of them.
    samples/reconstructions.png: pictures beside their reconstructions; held back pictures if there are some.
    samples/interpolations.png: between the latents of pairs of training pictures.

    The pictures in samples/ are the data's, or similar to them. They stay in the run directory: nothing that is
    published from a run includes them.

    Args:
        run: A run with its history and diagnostics.
        networks: Stage 1 as `Run.load_networks` returns it: images in [0, 1] -> [reconstruction, mean, log_sd], or
            [reconstruction, latent].
        splits: The pictures.
    """
    folder = run.path / "figures"
    records = run.history()
    plots.history(folder / "history.png", records)
    if len(networks.outputs) == 3:
        plots.variances(folder / "figure5.png", np.asarray(run.diagnostics["posterior_variance"]))
        plots.along_first_epoch(folder / "figure6.png", run.history("trace"))
        plots.along_training(folder / "figure7.png", [record for record in records if record["stage"] == 1])

    shown, train = splits.validation or splits.train, splits.train
    reconstructions(run.path / "samples" / "reconstructions.png", networks, shown.rows(_spread(len(shown), PAIRS)))
    ends = train.rows(_spread(len(train), 2 * ROWS))
    interpolations(run.path / "samples" / "interpolations.png", networks, ends)


def _spread(count: int, wanted: int) -> IndexArray:
    """Return indices spread over `count` pictures: in a file that is sorted by class, the first are all alike."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(np.intp)


def grid(path: Path, images: UInt8Array, columns: int = 0) -> None:
    """Write images [n, h, w, c] as one PNG with so many columns; 0 makes it about square. Training leaves it out."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:count] = images
    sheet = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    with replacing(path) as part:
        Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(part, "PNG", pnginfo=sheet_mark())


def reconstructions(path: Path, networks: keras.Model, images: UInt8Array) -> None:
    """Write each of uint8 images [n, h, w, c] with, on its right, its reconstruction from the posterior's mean."""
    beside(path, images, to_uint8(networks(images / np.float32(255), training=False)[0]))


def beside(path: Path, left: UInt8Array, right: UInt8Array) -> None:
    """Write uint8 images [n, h, w, c], each with another on its right, pairs apart from each other."""
    gap = max(left.shape[1] // 8, 2)
    pairs = np.concatenate([left, right], axis=2)
    grid(path, np.pad(pairs, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255))


def interpolations(path: Path, networks: keras.Model, images: UInt8Array) -> None:
    """Write interpolations between pairs of uint8 images [n, h, w, c]: a row a pair, decoded from latents."""
    latents = ops.convert_to_numpy(networks(images / np.float32(255), training=False)[1])
    pairs = len(images) // 2
    between = spherical(latents[:pairs], latents[pairs : 2 * pairs], STEPS)
    decoded = networks.get_layer("decoder")(between.reshape(pairs * STEPS, -1), training=False)
    grid(path, to_uint8(decoded), STEPS)


def spherical(start: Float32Array, end: Float32Array, steps: int) -> Float32Array:
    """Return latents [n, steps, size] from start to end, both [n, size].

    They are on the straight line, scaled to lengths between those of the ends: in many dimensions the line itself
    passes nearer to the origin than the latents that the decoder has learned from.
    """
    share = np.linspace(0, 1, steps, dtype=np.float64)[:, None]
    a, b = start[:, None].astype(np.float64), end[:, None].astype(np.float64)
    line = (1 - share) * a + share * b
    wanted = (1 - share) * _length(a) + share * _length(b)
    return (line * wanted / np.maximum(_length(line), 1e-12)).astype(np.float32)


def _length(latents: Float64Array) -> Float64Array:
    length: Float64Array = np.linalg.norm(latents, axis=-1, keepdims=True)
    return length


def to_uint8(images: Any) -> UInt8Array:
    """Return images in [0, 1] as uint8, rounded."""
    values: Float32Array = ops.convert_to_numpy(images)
    return np.rint(values * 255).astype(np.uint8)
