"""Sampling of one chain by everything that can run it: Keras, TensorFlow, torch, OpenVINO, ONNX Runtime, and ours.

    python benchmarks/sampling.py --recipe faces                            the embedded model's chain
    python benchmarks/sampling.py --recipe celeba --torch torchvenv/bin/python

torch is not among this project's packages: python -m venv torchvenv && torchvenv/bin/pip install torch keras click
pillow makes an interpreter that has what is needed. Its network is the same one, by Keras on its torch backend, and is
compiled as torch.compile does by default: for the first batch, and then for any. TensorFlow runs with oneDNN on, as in
training.

The float32 limit is what a chain would reach at the speed of NumPy's product of two large matrices; int8 may exceed it.
Each runtime is a process of its own, with its own threads, that is asked over a pipe for one measurement at a time, so
that all take turns. Weights are random, as speed does not depend on them, and the same for all: pictures that are more
than a grey level on average from Keras' are an error.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import runtimes
from exporter import WAYS, build, child
from measure import Row, Table, finish, interleave, json_option, speed
from runtimes import Peers, Runtime

KERAS, NAIVE = "Keras predict", "tf2onnx's graph, ONNX Runtime"
PRODUCT, LIMIT = "a dense float32 matrix product", "the float32 limit"
SIDE = 2048  # of its matrices
ARITHMETIC = {"f32": "float32", "bf16": "bfloat16"}  # as OpenVINO calls it, and we
APART = 1.0  # grey levels on average, as the engine allows fast arithmetic


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--recipe", default="faces", show_default=True)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 16, 64, 256), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="A measurement, at least.")
@click.option("--torch", "python", metavar="PYTHON", help="An interpreter that has torch, keras, click and pillow.")
@click.option(
    "--keep",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Take the models from there, as exporter.py --keep left them, or convert into it.",
)
@json_option
def main(
    context: click.Context,
    recipe: str,
    batches: tuple[int, ...],
    rounds: int,
    seconds: float,
    python: str | None,
    keep: Path | None,
    report: Path | None,
) -> None:
    """Print images a second, a table for each batch."""
    if context.invoked_subcommand:
        return
    from export import inspect
    from serve import load

    pythons = {"tensorflow": sys.executable, "onnx": sys.executable}
    if python or find_spec("torch"):
        pythons["torch"] = python or sys.executable
    missing = [] if "torch" in pythons else ["torch: it is not installed here, and --torch names no interpreter"]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = keep or Path(temporary)
        if not all((folder / f"{name}.onnx").exists() for name in ("naive", "fp32", "int8")):
            for way in WAYS:
                child(way, recipe, folder)
        flops = inspect(load(folder / "fp32.onnx"))["flops"]
        # One after the other: TensorFlow's writes the weights that torch's reads.
        processes = [
            stack.enter_context(
                runtimes.runtime(
                    name,
                    [each, __file__, "answer", name, recipe, str(folder), str(max(batches))],
                    {"KERAS_BACKEND": "torch" if name == "torch" else "tensorflow"},
                )
            )
            for name, each in pythons.items()
        ]
        missing += [each for process in processes for each in process.left_out]
        tables = []
        for batch in batches:
            work, failed = prepared(processes, batch, seconds, folder / "images.npy")
            missing += failed
            found = interleave({**work, PRODUCT: product()}, rounds, warm=False)
            products = found.pop(PRODUCT)
            rows = [Row(name, "images/s", values) for name, values in found.items()]
            rows += [
                Row(LIMIT, "images/s", [1e9 * value / flops for value in products]),
                Row(PRODUCT, "GFLOP/s", products),
            ]
            title = f"The chain of {recipe}, {flops / 1e9:.3g} GFLOP a picture, in batches of {batch}"
            tables.append(Table(title, rows, [NAIVE, LIMIT]))
            tables[-1].show()
        versions = {name: each for process in processes for name, each in process.versions.items()}
        finish(report, __doc__, tables, missing, versions)


def prepared(
    processes: Sequence[Runtime], batch: int, seconds: float, path: Path
) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """Return what measures each peer, warm and compared with Keras, and which cannot run, and why."""
    work: dict[str, Callable[[], float]] = {}
    failed, wanted = [], None
    for each in processes:
        for name in each.names:
            try:
                images = each.images(name, batch, path)
            except RuntimeError as error:
                failed.append(f"{name} in batches of {batch}: {error}")
                continue
            wanted = images if wanted is None else wanted  # Keras is the first
            apart = np.abs(images - wanted).mean()
            if apart > APART:
                raise click.ClickException(
                    f"{name} should make the pictures that {KERAS} makes, within {APART} grey levels on average. "
                    f"Received: {apart:.2f}"
                )
            work[name] = partial(each.measure, name, batch, seconds)
    return work, failed


def product() -> Callable[[], float]:
    """Return what measures the GFLOP/s of NumPy's product of two square matrices."""
    square = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    result = np.empty_like(square)
    return lambda: speed(lambda: np.matmul(square, square, result), 1, 0.2) * 2 * SIDE**3 / 1e9


@main.command(hidden=True)
@click.argument("name", type=click.Choice(["tensorflow", "torch", "onnx"]))
@click.argument("recipe")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("largest", type=int)
def answer(name: str, recipe: str, folder: Path, largest: int) -> None:
    """Be one of the runtimes' processes."""
    from training import RECIPES

    def make() -> tuple[Peers, list[str]]:
        if name == "onnx":
            return onnx_peers(folder, largest)
        return (tensorflow_peers if name == "tensorflow" else torch_peers)(recipe, folder), []

    runtimes.answer(make, RECIPES[recipe]().latent_dim)


def tensorflow_peers(recipe: str, folder: Path) -> Peers:
    """Return Keras' own way to predict, and the network as a graph; the weights are written for torch."""
    chain = build(recipe)

    import tensorflow  # after Keras, which training keeps quiet

    np.savez(folder / "weights.npz", *chain.get_weights())
    graph = tensorflow.function(chain)
    return {
        KERAS: lambda noise: chain.predict(noise, batch_size=len(noise), verbose=0),
        "tf.function": lambda noise: graph(noise).numpy(),
    }


def torch_peers(recipe: str, folder: Path) -> Peers:
    """Return the network as Keras has torch run it, and compiled."""
    import torch

    chain = build(recipe)
    weights = np.load(folder / "weights.npz")
    chain.set_weights([weights[name] for name in weights.files])
    compiled = torch.compile(chain)

    def run(network: Any, noise: Any) -> Any:
        with torch.no_grad():
            return network(torch.from_numpy(noise)).numpy()

    return {"torch eager": partial(run, chain), "torch.compile": partial(run, compiled)}


def onnx_peers(folder: Path, largest: int) -> tuple[Peers, list[str]]:
    """Return those that run ONNX files, and why others are missing."""
    from serve import Engine, EngineError, load

    peers: dict[str, Callable[[Any], Any]] = {NAIVE: _in_onnxruntime(folder / "naive.onnx")}
    left_out = []
    try:
        peers |= _in_openvino(folder / "naive.onnx")
    except ImportError:
        left_out.append("OpenVINO: it is not installed here")
    ways: list[tuple[str, Literal["exact", "fast"]]] = [("cpu", "exact"), ("openvino", "exact"), ("openvino", "fast")]
    for precision in ("fp32", "int8"):
        bundle = load(folder / f"{precision}.onnx")
        for device, arithmetic in ways:
            try:
                # A small one first, as only an engine says whether there is anything faster than exact arithmetic.
                if arithmetic == "fast" and Engine(bundle, device, batch=1, arithmetic="fast").arithmetic == "exact":
                    left_out.append(f"ours, {precision}, {device}, fast: this processor has nothing faster than exact")
                    continue
                engine = Engine(bundle, device, batch=largest, arithmetic=arithmetic)
            except EngineError as error:
                left_out.append(f"ours, {precision}, {device}, {arithmetic}: {error}")
            else:
                peers[f"ours, {precision}, {device}, {engine.arithmetic}"] = engine.compute
    return peers, left_out


def _in_onnxruntime(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda noise: session.run(["images"], {"noise": noise})[0]


def _in_openvino(path: Path) -> Peers:
    """As its documentation has it, and in float32 where that is something else: bfloat16, if the processor has that."""
    import openvino

    peers: dict[str, Callable[[Any], Any]] = {}
    for hint in ({"INFERENCE_PRECISION_HINT": "f32"}, {}):
        model = openvino.compile_model(path, "CPU", hint)
        chosen = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        peers[f"tf2onnx's graph, OpenVINO, {ARITHMETIC.get(chosen, chosen)}"] = partial(_inferred, model)
    return peers


def _inferred(model: Any, noise: Any) -> Any:
    return model(noise)["images"]


if __name__ == "__main__":
    main()
