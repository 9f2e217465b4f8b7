"""Our model repository in a real Triton server.

    pip download --no-deps nvidia-pytriton==0.7.0, unzip the wheel, then
    python benchmarks/repository.py --server pytriton/tritonserver

That build has the python backend only. So Triton first reads the repository as it was written, and says that it
lacks the onnxruntime backend; then the same config, but for its backend and its time-out, runs the bundle through a
few lines of Python (peers.py), and its pictures over gRPC are compared with the engine's.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc as inference  # type: ignore[import-untyped]  # it ships no types
from peers import Triton, failure, triton, tritonserver

from export.bundles.triton import write_repository
from serve.bundle import DEFAULT, load
from serve.engine import Engine

BATCH = 64


@click.command()
@click.option(
    "--server",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Triton's folder in the unzipped wheel.",
)
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--count", default=512, show_default=True)
def main(server: Path, model: Path, count: int) -> None:
    """Print what Triton says, and what it makes."""
    bundle = load(model)
    name = bundle.card.name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "models"
        write_repository([bundle], folder, force=False)
        with tritonserver(server, folder) as (_, said):
            print("as written:", failure(said) or "loaded")
    with triton(server, bundle, threads=0) as peer:
        with inference.InferenceServerClient(peer.address) as client:
            config = client.get_model_config(name).config
        print(f"python backend: {name} is ready; batches of {list(config.dynamic_batching.preferred_batch_size)}")
        _compare(peer, Engine(bundle, device="cpu"), count)


def _compare(peer: Triton, engine: Engine, count: int) -> None:
    apart, began = 0, time.monotonic()
    with peer.connect() as ask:
        for at in range(0, count, BATCH):
            images = ask(0, at, BATCH)
            apart = max(apart, int(np.abs(images.astype(int) - engine.sample(0, at, BATCH)).max()))
    seconds = time.monotonic() - began
    print(f"{count} samples over gRPC: at most {apart} grey levels from the engine's ({seconds:.1f} s, both)")


if __name__ == "__main__":
    main()
