"""What a bundle is: figures that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.bundles.inspect import inspect, render
from serve.bundle import Bundle, check, load
from serve.card import Card
from tests.conftest import assert_clear_error, inside

CARD = Card("tiny", (4, 4, 3), 5, 5, "normal", {"mode": "none"}, "fp32", {"name": "none"})


def bundle(body: str, weights: str) -> Bundle:
    text = f"""<ir_version: 10, opset_import: ["": 18]>
        g (float[batch,5] noise) => (uint8[batch,4,4,3] images) <{weights}> {{ {body} }}"""
    return Bundle(onnx.parser.parse_model(text).SerializeToString(), CARD, "digest")


def zeros(name: str, kind: str, *shape: int) -> str:
    return f"{kind}[{','.join(map(str, shape))}] {name} = {{{','.join(['0'] * prod(shape))}}}"


def test_costs_of_one_sample() -> None:
    found = inspect(
        bundle(
            """flat = Gemm(noise, w, b)
            grid = Reshape(flat, shape)
            up = ConvTranspose<strides = [2, 2]>(grid, u)
            act = Relu(up)
            out = Conv<pads = [1, 1, 1, 1]>(act, k)
            bytes = Cast<to = 2>(out)
            images = Transpose<perm = [0, 2, 3, 1]>(bytes)""",
            ", ".join([
                zeros("w", "float", 5, 8), zeros("b", "float", 8),
                "int64[4] shape = {-1, 2, 2, 2}",
                zeros("u", "float", 2, 7, 2, 2), zeros("k", "float", 3, 7, 3, 3),
            ]),
        )
    )  # fmt: skip
    gemm, up, relu, conv = 2 * 5 * 8, 2 * (2 * 7 * 4) * 4, 7 * 16, 2 * (3 * 7 * 9) * 16
    assert found["flops"] == gemm + up + relu + conv
    assert found["parameters"] == 40 + 56 + 189
    assert found["kept_in"] == {"float32": 285}
    assert found["activation_bytes"] == 4 * (8 + 8 + 112 + 112 + 48) + 48 + 48
    assert found["inputs"] == [{"name": "noise", "type": "float32", "shape": ["batch", 5]}]
    assert found["outputs"] == [{"name": "images", "type": "uint8", "shape": ["batch", 4, 4, 3]}]
    assert found["operators"]["Conv"] == 1
    assert found["nodes"] == 7


def test_weights_are_counted_in_what_they_are_kept_in() -> None:
    """Behind a Cast or a DequantizeLinear a weight is what it was, and costs nothing per sample."""
    found = inspect(
        bundle(
            """wide = Cast<to = 1>(w)
            a = Gemm(noise, wide)
            real = DequantizeLinear<axis = 1>(v, s)
            flat = Gemm(a, real)
            grid = Reshape(flat, shape)
            images = Cast<to = 2>(grid)""",
            ", ".join([
                zeros("w", "float16", 5, 6), zeros("v", "int8", 6, 48),
                zeros("s", "float", 48), "int64[4] shape = {-1, 4, 4, 3}",
            ]),
        )
    )  # fmt: skip
    assert found["kept_in"] == {"float16": 30, "int8": 288}
    assert found["parameters"] == 318
    assert found["flops"] == 2 * 318
    assert found["activation_bytes"] == 4 * (6 + 48 + 48) + 48


@pytest.mark.parametrize(
    ("body", "weights", "multiplications"),
    [
        ("flat = Gemm<transB = 1>(noise, w)", [zeros("w", "float", 48, 5)], 5 * 48),
        ("t = Transpose(noise)  flat = Gemm<transA = 1>(t, w)", [zeros("w", "float", 5, 48)], 5 * 48),
        ("real = Transpose(w)  flat = MatMul(noise, real)", [zeros("w", "float", 48, 5)], 5 * 48),
        (
            "few = MatMul(noise, w)  some = Reshape(few, to)  flat = Conv<group = 3, pads = [1, 1, 1, 1]>(some, k)",
            [zeros("w", "float", 5, 48), "int64[4] to = {-1, 3, 4, 4}", zeros("k", "float", 3, 1, 3, 3)],
            5 * 48 + 3 * 9 * 16,
        ),
        (
            "few = MatMul(noise, w)  a, b = Split<axis = 1, num_outputs = 2>(few)  flat = Concat<axis = 1>(b, a)",
            [zeros("w", "float", 5, 48)],
            5 * 48,
        ),
        (
            "a = Reshape(noise, tall)  b = Reshape(noise, wide)  c = MatMul(a, b)  d = Reshape(c, rows)"
            "  flat = MatMul(d, w)",
            [
                "int64[3] tall = {-1, 5, 1}, int64[3] wide = {-1, 1, 5}, int64[2] rows = {-1, 25}",
                zeros("w", "float", 25, 48),
            ],
            5 * 5 + 25 * 48,
        ),
    ],
    ids=["transB", "transA", "transposed", "groups", "split", "no-weight"],
)
def test_work_of_a_layer_however_it_is_written(body: str, weights: list[str], multiplications: int) -> None:
    end = "  grid = Reshape(flat, shape)  images = Cast<to = 2>(grid)"
    found = inspect(bundle(body + end, ", ".join([*weights, "int64[4] shape = {-1, 4, 4, 3}"])))
    assert found["flops"] == 2 * multiplications


def test_what_is_not_known_is_not_guessed() -> None:
    """How many values are not zero shows only as the graph runs."""
    found = inspect(
        bundle(
            """places = NonZero(noise)
            real = Cast<to = 1>(places)
            total = ReduceSum(real)
            grid = Add(total, w)
            images = Cast<to = 2>(grid)""",
            zeros("w", "float", 1, 4, 4, 3),
        )
    )
    assert found["flops"] is None
    assert found["activation_bytes"] is None
    assert "unknown GFLOP, unknown MB" in render(found)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_embedded_faces(precision: str) -> None:
    from serve.bundle import EMBEDDED

    result = inside("export-onnx", "inspect", EMBEDDED[precision], "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    made = load(EMBEDDED[precision])
    assert found["digest"] == made.digest
    assert found["card"] == json.loads(json.dumps(dataclasses.asdict(made.card)))
    # By hand, from base_dim 24: second stage; from the latent to two grids of 4x4x384; three convolutions and one
    # transposed one at each of four scales, the first having one convolution less and no transposed one; pixels.
    dense = 64 * 1024 + 1024 * 1024 * 2 + 1088 * 64 + 2 * 64 * 16 * 384
    squares = [9 * width**2 for width in (384, 192, 96, 48, 24)]
    layers = 2 * squares[0] + sum((3 + 2) * square for square in squares[1:]) + 9 * 24 * 3
    assert found["parameters"] == dense + layers
    places = 2 * squares[0] * 16 + sum(3 * square * (8 * 2**at) ** 2 for at, square in enumerate(squares[1:]))
    places += sum(2 * square * (4 * 2**at) ** 2 for at, square in enumerate(squares[1:])) + 9 * 24 * 3 * 64**2
    multiplications = 2 * (dense + places)
    assert multiplications <= found["flops"] <= 1.05 * multiplications
    text = inside("export-onnx", "inspect", EMBEDDED[precision]).stdout
    for word in ("64x64x3", made.digest, "non-commercial", "verified", f"{found['parameters']:,}"):
        assert word in text


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ([("Gemm", ["noise"], ["images"])], "input"),
        ([("Relu", ["images"], ["images"])], "images"),
        ([("Conv", ["noise", "noise"], ["x"]), ("Cast", ["x"], ["images"])], "to"),
    ],
)
def test_a_graph_that_is_none_is_said_in_one_line(
    nodes: list[tuple[str, list[str], list[str]]], why: str, smoke_bundle: Path, tmp_path: Path
) -> None:
    model = onnx.load(smoke_bundle)
    del model.graph.node[:]
    model.graph.node.extend(onnx.helper.make_node(*node) for node in nodes)
    onnx.save(model, tmp_path / "none.onnx")
    assert_clear_error(inside("export-onnx", "inspect", tmp_path / "none.onnx"), "cannot be read", why)


def test_what_cannot_be_inferred_is_unknown(smoke_bundle: Path, tmp_path: Path) -> None:
    """A graph for batches of four only: there are no shapes of one sample."""
    model = onnx.load(smoke_bundle)
    del model.graph.node[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 384), np.float32), "four"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 16, 16, 3]), "grid"))
    for kind, inputs, output, more in (
        ("Transpose", ["noise"], "turned", {}),
        ("MatMul", ["turned", "four"], "flat", {}),
        ("Reshape", ["flat", "grid"], "floats", {}),
        ("Cast", ["floats"], "images", {"to": onnx.TensorProto.UINT8}),
    ):
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], **more))
    onnx.save(model, tmp_path / "odd.onnx")
    result = inside("export-onnx", "inspect", tmp_path / "odd.onnx")
    assert result.returncode == 0, result.stderr
    assert "unknown GFLOP" in result.stdout
    assert "Traceback" not in result.stderr


def test_constants_upon_constants_take_no_time(smoke_bundle: Path) -> None:
    """Each adds the one before to itself: whoever follows every path never arrives."""
    model = onnx.load(smoke_bundle)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "c0"))
    nodes = [onnx.helper.make_node("Add", [f"c{n}", f"c{n}"], [f"c{n + 1}"]) for n in range(100)]
    model.graph.node.extend(nodes)
    data = model.SerializeToString()
    found = inspect(Bundle(data, check(data), "digest"))
    assert found["operators"]["Add"] >= 100
    assert found["flops"] == inspect(load(smoke_bundle))["flops"]
