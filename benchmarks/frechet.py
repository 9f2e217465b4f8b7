"""Frechet distance of a run's pictures to the pictures it was trained on.

REC are reconstructions from each posterior's mean, GEN-1 samples of stage 1 alone, GEN-2 samples of both
stages under each latent normalisation. The features are those of an ONNX model (--features; its name goes
beside every figure): Inception's 2015 graph would make it FID, another one does not.

python benchmarks/frechet.py runs/mine --data photos/ --features efficientnet-lite0.onnx
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import onnxruntime
from scipy import linalg

Statistics = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
BATCH = 100


class Extractor:
    """Features of images through an ONNX model: uint8 [n, h, w, 3] -> float [n, f]."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def statistics(self, batches: Iterable[npt.NDArray[np.uint8]]) -> Statistics:
        """Return mean and covariance of the features, summed in float64 as the batches come."""
        count, total, square = 0, np.float64(0), np.float64(0)
        for images in batches:
            features = self.session.run(None, {self.input: images})[0].astype(np.float64)
            count, total = count + len(features), total + features.sum(axis=0)
            square = square + features.T @ features
        mean = total / count
        return mean, (square - count * np.outer(mean, mean)) / (count - 1)


def distance(a: Statistics, b: Statistics) -> float:
    """Return the Frechet distance of two Gaussians: |ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^1/2)."""
    roots = np.sqrt(np.maximum(linalg.eigvals(a[1] @ b[1]).real, 0))
    return float(np.sum((a[0] - b[0]) ** 2) + np.trace(a[1]) + np.trace(b[1]) - 2 * roots.sum())


@click.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--features", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--n", default=5000, show_default=True, help="Pictures made for each figure.")
def main(run_path: Path, data: Path, features: Path, n: int) -> None:
    """Print REC, GEN-1 and GEN-2 as JSON, and keep them in the run's metrics.json."""
    from training.dataset import load
    from training.run import Run, write_json
    from training.twostage import to_uint8
    from training.vae import xla

    run = Run(run_path)
    recipe = run.recipe
    dataset = load(data, recipe, skip_unreadable=True)
    extractor = Extractor(features)
    reference = extractor.statistics(batches(dataset.images))
    first = run.load_networks(1)
    decoder = first.get_layer("decoder")
    for network in (decoder, first.get_layer("encoder")):
        network.jit_compile = xla()
    noise = np.random.default_rng(1).standard_normal((n, recipe.latent_dim), np.float32)

    def pictures(latents: npt.NDArray[np.float32]) -> Iterable[npt.NDArray[np.uint8]]:
        for part in batches(latents):
            yield to_uint8(decoder.predict_on_batch(part))

    def score(latents: npt.NDArray[np.float32]) -> float:
        return round(distance(extractor.statistics(pictures(latents)), reference), 2)

    some = np.random.default_rng(2).permutation(len(dataset))[:n]
    means = first.get_layer("encoder").predict(dataset.images[some] / np.float32(255), batch_size=BATCH, verbose=0)[0]
    scores: dict[str, Any] = {"REC": score(means), "GEN-1": score(noise)}
    if recipe.epochs2:
        second = run.load_networks(2).get_layer("decoder")
        latents = second.predict(noise, batch_size=BATCH, verbose=0)
        mean = np.array(run.diagnostics["aggregate_mean"])
        variance = np.array(run.diagnostics["aggregate_variance"])
        scalar = np.sqrt(variance.mean()) / latents.std(axis=0).mean()
        each = (latents - latents.mean(axis=0)) / latents.std(axis=0) * np.sqrt(variance) + mean
        scores["GEN-2 none"] = score(latents)
        scores["GEN-2 scalar"] = score((latents * scalar).astype(np.float32))
        scores["GEN-2 per-dimension"] = score(each.astype(np.float32))
        scores["scalar"] = round(float(scalar), 4)
    protocol = {"metric": f"FD ({features.stem})", "samples": n, "reference": f"the {len(dataset)} training pictures"}
    write_json(run.path / "metrics.json", [{**protocol, **scores}])
    print(json.dumps({**protocol, **scores}))


def batches(items: npt.NDArray[Any]) -> Iterable[npt.NDArray[Any]]:
    """Yield the items in batches."""
    for at in range(0, len(items), BATCH):
        yield items[at : at + BATCH]


if __name__ == "__main__":
    main()
