"""The exporter against tf2onnx as it comes: seconds, memory, size, and the speed of what they write.

python benchmarks/exporter.py                                   CelebA's chain, 50 million weights
python benchmarks/exporter.py --recipe faces --batch 32 --device cpu --device openvino

Each conversion runs in a process of its own, for its peak memory. Weights are random: speed does not depend on them,
but int8's error does.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from measure import Row, Table, finish, interleave, json_option, speed

NAIVE = "tf2onnx, unchanged"
WAYS = {"naive": NAIVE, "ours": "ours"}
UNITS = {"seconds": "s", "peak": "MB of memory", "nodes": "nodes", "size": "MB of file"}  # of a conversion's facts


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--recipe", default="celeba", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=(64, 100), show_default=True)
@click.option("--device", "devices", multiple=True, default=("cpu", "openvino"), show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--keep", metavar="FOLDER", type=click.Path(path_type=Path), help="Keep the models there.")
@json_option
def main(
    context: click.Context,
    recipe: str,
    batches: tuple[int, ...],
    devices: tuple[str, ...],
    rounds: int,
    keep: Path | None,
    report: Path | None,
) -> None:
    """Print what a conversion takes, and images a second of the models."""
    if context.invoked_subcommand:
        return
    from serve.devices import parse
    from serve.noise import draw

    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        told = {way: child(way, recipe, folder) for way in WAYS}
        tables = [_costs(recipe, told)]
        tables[0].show()
        paths = sorted(folder.glob("*.onnx"), key=lambda path: (path.stem != "naive", path.stem))
        size, left_out = told["ours"]["noise"], []
        for device in map(parse, devices):
            runs = {NAIVE if path.stem == "naive" else path.stem: opened(path, device, batches, size) for path in paths}
            if None in runs.values():
                left_out.append(f"{device}: there is no such device here")
                continue
            for batch in batches:
                noise = draw(0, 0, batch, size)
                work = {name: partial(speed, partial(run, noise), batch) for name, run in runs.items()}
                rows = [Row(name, "images/s", values) for name, values in interleave(work, rounds).items()]
                tables.append(Table(f"The chain of {recipe} on {device}, batches of {batch}", rows, [NAIVE]))
                tables[-1].show()
        finish(report, __doc__, tables, left_out)


def opened(path: Path, device: Any, batches: tuple[int, ...], size: int) -> Any:
    """Return what runs a model file on a device, noise to images; None where the device is not there.

    Not by the public `serve.Engine`, which takes bundles alone: tf2onnx's graph is none.
    """
    from serve import devices, openvino

    data = path.read_bytes()
    if device.kind == "openvino":
        return openvino.open_model(data)
    table = devices.providers(device, sorted(batches), size, path.parent / "tensorrt")
    session = devices.open_session(devices.graph(data, device), device, table)
    return session and (lambda noise: session.run(["images"], {"noise": noise}))


def _costs(recipe: str, told: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for way, facts in told.items():
        facts["seconds"] = sum(facts["parts"].values())
        rows += [Row(WAYS[way], unit, [facts[name]]) for name, unit in UNITS.items()]
        rows += [Row(f"{WAYS[way]}: {name}", "s", [seconds]) for name, seconds in facts["parts"].items()]
    title = f"The chain of {recipe}, converted once each; int8 is from fp32 {told['ours']['difference']}"
    return Table(title, rows, [NAIVE])


@main.command()
@click.argument("way", type=click.Choice(list(WAYS)))
@click.argument("recipe")
@click.argument("folder", type=click.Path(path_type=Path))
def convert(way: str, recipe: str, folder: Path) -> None:
    """Convert in this process; print what it took as JSON."""
    chain = build(recipe)
    parts: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        value = run()
        parts[name] = time.perf_counter() - began
        return value

    facts = (_naive if way == "naive" else _ours)(chain, folder, timed)
    facts["parts"] = parts
    print(json.dumps(facts))


def build(name: str, **changes: Any) -> Any:
    """Return a changed recipe's chain, untrained, with statistics for batch normalisation that are not 0 and 1."""
    import numpy as np

    # What the public interface exports is a trained run, and what it writes is verified: neither is measured here.
    from training.model.networks import image_decoder, latent_decoder
    from training.model.normalise import Normalisation
    from training.recipes import RECIPES

    # After training, which keeps TensorFlow quiet.
    import keras  # isort: skip
    from export.chain import Affine, ToUint8  # isort: skip

    recipe = replace(RECIPES[name](), **changes)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    first, second = image_decoder(recipe), latent_decoder(recipe)
    for variable in (*first.variables, *second.variables):
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    first.name, second.name = "stage1", "stage2"
    size = recipe.latent_dim
    constants = Normalisation("scalar", np.full(size, 1.1, np.float32), np.zeros(size, np.float32), 1)
    noise = keras.Input((size,), name="noise")
    images = ToUint8(name="pixels")(first(Affine(constants, name="normalise")(second(noise))))
    return keras.Model(noise, images, name="chain")


def packed(graph: Any, chain: Any) -> Any:
    """Return the bundle of a chain's graph."""
    from export.bundles.pack import pack
    from serve.card import Card

    size = chain.input_shape[-1]
    return pack(
        graph, Card("bench", chain.output_shape[1:], size, size, "second-stage", {"mode": "scalar"}, "fp32", {})
    )


def _naive(chain: Any, folder: Path, timed: Callable[..., Any]) -> dict[str, Any]:
    """tf2onnx as its documentation has it: the model as a function of its input."""
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec([None, chain.input_shape[-1]], tf.float32, name="noise")]
    proto, _ = timed("tf2onnx", lambda: tf2onnx.convert.from_function(tf.function(chain), signature, opset=18))
    proto.graph.output[0].name, proto.graph.node[-1].output[0] = "images", "images"
    path = folder / "naive.onnx"
    timed("write", lambda: path.write_bytes(proto.SerializeToString()))
    return {"peak": _peak(), "nodes": len(proto.graph.node), "size": path.stat().st_size / 1e6}


def _ours(chain: Any, folder: Path, timed: Callable[..., Any]) -> dict[str, Any]:
    import numpy as np

    from export.bundles.compare import compare
    from export.convert import convert as convert_chain
    from export.passes import optimise
    from export.passes.blocks import split_rows
    from export.precision.choose import choose
    from export.session import decoder

    model = timed("tf2onnx", lambda: convert_chain(chain))
    timed("passes", lambda: optimise(model))
    size = chain.input_shape[-1]
    path = folder / "fp32.onnx"

    def write(name: str, graph: Any) -> None:
        (folder / f"{name}.onnx").write_bytes(packed(graph, chain).data)

    timed("write", lambda: write("fp32", model))
    facts = {"peak": _peak(), "nodes": len(model.graph), "size": path.stat().st_size / 1e6, "noise": size}
    # What was tried for float32 and did not win, and int8.
    for name, block in (("fp32, branches joined", join_branches), ("fp32, rows split", split_rows)):
        other = model.clone()
        optimise(other, [block])
        write(name, other)
    rounded, floats = choose(model, 1.0)
    write("int8", rounded)
    found = compare(decoder(model), decoder(rounded), size, 256)
    facts["difference"] = f"{found.mean:.3f} grey levels on average, {found.worst} at most; {len(floats)} layers float"
    assert np.isfinite(found.mean)
    return facts


def join_branches(graph: Any) -> int:
    """Make the sum of two convolutions one convolution of both inputs, side by side.

    The residual block's last convolution and its shortcut. It was tried and lost: see docs/export.md.
    """
    import numpy as np

    from export.passes.graph import add, constants, producer, replace, weight

    joined = 0
    for node in list(graph):
        first, second = (
            (producer(value, "Conv") for value in node.inputs[:2]) if node.op_type == "Add" else (None, None)
        )
        one, two = (constants(each, 1, 2) if each is not None else None for each in (first, second))
        if first is None or second is None or one is None or two is None:
            continue
        both = add(node, "Concat", [first.inputs[0], second.inputs[0]], f"{node.name}/both", axis=1)
        kernel = weight(graph, np.concatenate([one[0], two[0]], axis=1), f"{first.name}/weight")
        bias = weight(graph, one[1] + two[1], f"{first.name}/bias")
        replace(node, "Conv", [both, kernel, bias], first.attributes, name=first.name)
        joined += 1
    return joined


def child(way: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Convert in another process, into a folder that it makes if need be; return what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "convert", way, recipe, str(folder)]
    result = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
