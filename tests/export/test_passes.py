"""Every pass: the operators before and after, and the same numbers."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from export.errors import ConversionError
from export.passes import PASSES, Pass, optimise
from export.passes.affine import fold_affine_after, fold_affine_before, merge_affine
from export.passes.blocks import norm_to_conv, split_rows
from export.passes.constants import fold_constants
from export.passes.dense import fold_reshape, make_gemm
from export.passes.layout import sink_transposes
from export.passes.linear import collapse_linear
from export.passes.names import name_nodes
from export.passes.pixels import round_and_saturate
from export.precision.half import halve
from export.session import open_model

RNG = np.random.default_rng(0)


def model(text: str, **weights: np.ndarray | tuple[int, ...]) -> ir.Model:
    """A graph in ONNX's text form; weights are arrays, or shapes to be filled."""
    made = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 18]> g {text}')
    for node in made.graph:
        node.name = f"layer/{node.outputs[0].name}"
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in weights:
                array = weights[value.name]
                if isinstance(array, tuple):
                    array = weights[value.name] = RNG.normal(size=array).astype(np.float32)
                initialiser = ir.Value(name=value.name, const_value=ir.tensor(array, name=value.name))
                initialiser.shape, initialiser.type = (
                    ir.Shape(array.shape),
                    ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                )
                made.graph.register_initializer(made.graph.initializers.get(value.name, initialiser))
                node.replace_input_with(index, made.graph.initializers[value.name])
    ShapeInferencePass()(made)
    return made


def operators(made: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in made.graph))


def outputs(made: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    return open_model(made).run(None, inputs)


def check(made: ir.Model, run: Pass, before: dict[str, int], after: dict[str, int], atol: float = 1e-5) -> None:
    """The pass takes a graph from some operators to others, at one go, and changes no number but by rounding."""
    given = {
        str(value.name): RNG.normal(size=[3 if not isinstance(s, int) else s for s in value.shape]).astype(np.float32)
        for value in made.graph.inputs
    }
    wanted = outputs(made, **given)
    assert operators(made) == before
    assert optimise(made, [run])[run.__name__] > 0
    assert operators(made) == after
    assert optimise(made, [run]) == {run.__name__: 0}
    for got, want in zip(outputs(made, **given), wanted, strict=True):
        if want.dtype == np.uint8:
            assert np.abs(got.astype(int) - want).max() <= 1
        else:
            np.testing.assert_allclose(got, want, atol=atol, rtol=1e-4)


def test_constants_are_folded() -> None:
    made = model(
        """(float[n,4] x) => (float[n,3] y) {
            wide = Cast<to: int = 1>(half)
            turned = Transpose<perm: ints = [1, 0]>(wide)
            y = MatMul(x, turned)
        }""",
        half=RNG.normal(size=(3, 4)).astype(np.float16),
    )
    check(made, fold_constants, {"Cast": 1, "Transpose": 1, "MatMul": 1}, {"MatMul": 1})
    assert len(made.graph.initializers) == 1  # what it was made of is gone


def test_products_and_their_bias_are_one_node() -> None:
    made = model("(float[n,4] x) => (float[n,3] y) { a = MatMul(x, w)  y = Add(a, b) }", w=(4, 3), b=(3,))
    check(made, make_gemm, {"MatMul": 1, "Add": 1}, {"Gemm": 1})


def test_a_product_that_others_read_is_left_alone() -> None:
    made = model("(float[n,4] x) => (float[n,3] y, float[n,3] a) { a = MatMul(x, w)  y = Add(a, b) }", w=(4, 3), b=(3,))
    assert optimise(made, [make_gemm]) == {"make_gemm": 0}


def test_transposes_sink_and_cancel() -> None:
    made = model(
        """(float[n,2,5,5] x) => (float[n,2,5,5] y) {
            last = Transpose<perm: ints = [0, 2, 3, 1]>(x)
            scaled = Mul(last, s)
            moved = Add(scaled, t)
            active = Relu(moved)
            y = Transpose<perm: ints = [0, 3, 1, 2]>(active)
        }""",
        s=(2,),
        t=(2,),
    )
    check(made, sink_transposes, {"Transpose": 2, "Mul": 1, "Add": 1, "Relu": 1}, {"Mul": 1, "Add": 1, "Relu": 1})


def test_the_output_is_transposed_as_bytes() -> None:
    made = model(
        """(float[n,3,4,4] x) => (uint8[n,4,4,3] y) {
            last = Transpose<perm: ints = [0, 2, 3, 1]>(x)
            rounded = Round(last)
            y = Cast<to: int = 2>(rounded)
        }"""
    )
    optimise(made, [sink_transposes])
    assert [node.op_type for node in made.graph] == ["Round", "Cast", "Transpose"]
    x = RNG.uniform(0, 255, (2, 3, 4, 4)).astype(np.float32)
    assert np.array_equal(outputs(made, x=x)[0], np.round(x).astype(np.uint8).transpose(0, 2, 3, 1))


def test_rounding_saturates() -> None:
    made = model(
        """(float[n,4] x) => (uint8[n,4] y) {
            levels = Mul(x, k)  rounded = Round(levels)  y = Cast<to: int = 2>(rounded)
        }""",
        k=np.array(255, np.float32),
    )
    assert optimise(made, [round_and_saturate]) == {"round_and_saturate": 1}
    assert operators(made) == {"QuantizeLinear": 1}
    x = np.array([[0, 255, 300, -9], [126.4, 126.6, 2, 1e9]], np.float32) / 255
    assert outputs(made, x=x)[0].tolist() == [[0, 255, 255, 0], [126, 127, 2, 255]]


def test_the_reshapes_transpose_is_an_order_of_columns() -> None:
    made = model(
        """(float[n,4] x) => (float[n,3,2,2] y) {
            flat = Gemm(x, w, b)
            grid = Reshape(flat, shape)
            y = Transpose<perm: ints = [0, 3, 1, 2]>(grid)
        }""",
        w=(4, 12),
        b=(12,),
        shape=np.array([-1, 2, 2, 3]),
    )
    check(made, fold_reshape, {"Gemm": 1, "Reshape": 1, "Transpose": 1}, {"Gemm": 1, "Reshape": 1})


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Conv<pads: ints = [1, 1, 1, 1]>(x, w, b)", {"w": (4, 3, 3, 3), "b": (4,)}),
        ("Conv<pads: ints = [1, 1, 1, 1]>(x, w)", {"w": (4, 3, 3, 3)}),
        ("ConvTranspose<strides: ints = [1, 1], pads: ints = [1, 1, 1, 1]>(x, w, b)", {"w": (3, 4, 3, 3), "b": (4,)}),
    ],
)
def test_batch_norm_folds_into_the_convolution_before_it(layer: str, weights: dict[str, tuple[int, ...]]) -> None:
    text = f"(float[n,3,5,5] x) => (float[n,4,5,5] y) {{ c = {layer}  d = Mul(c, s)  y = Add(d, t) }}"
    made = model(text, s=(1, 4, 1, 1), t=(4, 1, 1), **weights)
    operator = layer.split("<")[0]
    check(made, fold_affine_after, {operator: 1, "Mul": 1, "Add": 1}, {operator: 1})


def test_normalisation_folds_into_the_dense_layer_before_it() -> None:
    text = "(float[n,5] x) => (float[n,3] y) { a = Gemm(x, w, c)  b = Mul(a, s)  y = Sub(b, t) }"
    made = model(text, w=(5, 3), c=(3,), s=(3,), t=(3,))
    check(made, fold_affine_after, {"Gemm": 1, "Mul": 1, "Sub": 1}, {"Gemm": 1})


def test_batch_norm_is_not_folded_where_others_read_the_convolution() -> None:
    made = model(
        """(float[n,3,5,5] x) => (float[n,4,5,5] y) {
            c = Conv<pads: ints = [1, 1, 1, 1]>(x, w, b)
            d = Mul(c, s)  e = Add(d, t)  f = Relu(e)
            y = Add(c, f)
        }""",
        w=(4, 3, 3, 3), b=(4,), s=(1, 4, 1, 1), t=(1, 4, 1, 1),
    )  # fmt: skip
    assert optimise(made, [fold_affine_after]) == {"fold_affine_after": 0}
    # It becomes one operator instead.
    check(
        made, merge_affine,
        {"Conv": 1, "Mul": 1, "Add": 2, "Relu": 1}, {"Conv": 1, "BatchNormalization": 1, "Add": 1, "Relu": 1},
    )  # fmt: skip
    check(
        made, norm_to_conv,
        {"Conv": 1, "BatchNormalization": 1, "Add": 1, "Relu": 1}, {"Conv": 2, "Add": 1, "Relu": 1},
    )  # fmt: skip


@pytest.mark.parametrize("size", [(5,), (1,)])
def test_normalisation_folds_into_the_dense_layer_after_it(size: tuple[int, ...]) -> None:
    text = "(float[n,5] x) => (float[n,3] y) { a = Mul(x, s)  b = Add(a, t)  y = Gemm(b, w, c) }"
    made = model(text, s=size, t=(5,), w=(5, 3), c=(3,))
    check(made, fold_affine_before, {"Mul": 1, "Add": 1, "Gemm": 1}, {"Gemm": 1})


def test_a_shift_is_not_folded_into_a_padded_convolution_after_it() -> None:
    text = "(float[n,3,5,5] x) => (float[n,4,5,5] y) { a = Add(x, t)  y = Conv<pads: ints = [1, 1, 1, 1]>(a, w, b) }"
    made = model(text, t=(1, 3, 1, 1), w=(4, 3, 3, 3), b=(4,))
    done = optimise(made, [fold_affine_after, fold_affine_before])
    assert set(done.values()) == {0}


def test_what_is_linear_in_the_latent_is_one_matrix() -> None:
    made = model(
        """(float[n,2] z) => (float[n,8,4,4] y) {
            flat = Gemm(z, w, b)
            grid = Reshape(flat, shape)
            up = ConvTranspose<strides: ints = [2, 2], pads: ints = [0, 0, 1, 1]>(grid, u, v)
            short = Conv<pads: ints = [1, 1, 1, 1]>(up, k, l)
            active = Relu(up)
            y = Add(short, active)
        }""",
        w=(2, 24), b=(24,), shape=np.array([-1, 6, 2, 2]), u=(6, 8, 3, 3), v=(8,), k=(8, 8, 3, 3), l=(8,),
    )  # fmt: skip
    before = {"Gemm": 1, "Reshape": 1, "ConvTranspose": 1, "Conv": 1, "Relu": 1, "Add": 1}
    check(made, collapse_linear, before, {"Gemm": 2, "Reshape": 2, "Relu": 1, "Add": 1}, atol=1e-4)


def test_a_matrix_that_would_be_larger_is_not_made() -> None:
    made = model(
        "(float[n,64] z) => (float[n,64] y) { a = Gemm(z, w, b)  c = Gemm(a, v, d)  y = Relu(c) }",
        w=(64, 2), b=(2,), v=(2, 64), d=(64,),
    )  # fmt: skip
    assert optimise(made, [collapse_linear]) == {"collapse_linear": 0}


@settings(max_examples=25, deadline=None)
@given(
    # What is cropped before and after, and what is added after, so that the sides are doubled.
    around=st.sampled_from(
        [
            (before, after, extra)
            for before, after, extra in product(range(3), range(3), range(2))
            if before + after >= extra
        ]
    ),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    channels=st.integers(1, 3),
)
def test_a_transposed_convolution_is_two_plain_ones(
    around: tuple[int, int, int], height: int, width: int, channels: int
) -> None:
    begin, end, extra = around
    kernel = 2 + begin + end - extra
    text = f"""(float[n,2,{height},{width}] x) => (float[n,{channels},{2 * height},{2 * width}] y) {{
        y = ConvTranspose<strides: ints = [2, 2], pads: ints = [{begin}, {begin}, {end}, {end}],
                          output_padding: ints = [{extra}, {extra}]>(x, w, b)
    }}"""
    made = model(text, w=(2, channels, kernel, kernel), b=(channels,))
    x = RNG.normal(size=(3, 2, height, width)).astype(np.float32)
    (wanted,) = outputs(made, x=x)
    assert optimise(made, [split_rows]) == {"split_rows": 1}
    assert "ConvTranspose" not in operators(made)
    np.testing.assert_allclose(outputs(made, x=x)[0], wanted, atol=1e-5)


def test_other_strides_stay_transposed_convolutions() -> None:
    text = "(float[n,2,4,4] x) => (float[n,3,12,12] y) { y = ConvTranspose<strides: ints = [3, 3]>(x, w, b) }"
    made = model(text, w=(2, 3, 3, 3), b=(3,))
    assert optimise(made, [split_rows]) == {"split_rows": 0}


def test_pictures_in_float16_and_numbers_in_float32() -> None:
    text = """(float[n,4] z) => (float[n,2,2,2] y) {
        flat = Gemm(z, w, b)  grid = Reshape(flat, shape)  act = Relu(grid)
        y = Conv<pads: ints = [1, 1, 1, 1]>(act, k, l)
    }"""
    sizes = {"w": (4, 12), "b": (12,), "shape": np.array([-1, 3, 2, 2]), "l": (2,)}
    made = model(text, k=(2, 3, 3, 3), **sizes)
    z = RNG.normal(size=(5, 4)).astype(np.float32)
    halved = halve(made)
    types = {value.name: str(value.dtype) for node in halved.graph for value in (*node.inputs, *node.outputs)}
    assert (types["flat"], types["act"], types["y"]) == ("FLOAT", "FLOAT16", "FLOAT16")
    (wanted,), (got,) = outputs(made, z=z), outputs(halved, z=z)
    np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(ConversionError, match="float16"):
        halve(model(text, k=np.full((2, 3, 3, 3), 1e6, np.float32), **sizes))


def test_names_are_the_layers_own() -> None:
    made = model(
        "(float[n,4] x) => (float[n,3] y) { a = Gemm(x, w, b)  c = Relu(a)  d = Gemm(c, v, b)  y = Relu(d) }",
        w=(4, 3), v=(3, 3), b=(3,),
    )  # fmt: skip
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    (wanted,) = outputs(made, x=x)
    for node, name in zip(made.graph, ["s/one", "s/one", "s/two", "s/act"], strict=True):
        node.name = name
    optimise(made, [name_nodes])
    assert np.array_equal(outputs(made, x=x)[0], wanted)
    assert [node.name for node in made.graph] == ["s/one", "s/one/relu", "s/two", "s/act"]
    assert set(made.graph.initializers) == {"s/one/weight", "s/one/bias", "s/two/weight"}
    assert made.graph.outputs[0].name == "y"


def test_all_passes_run_twice_change_nothing_the_second_time() -> None:
    made = model(
        """(float[n,4] noise) => (uint8[n,4,4,3] images) {
            a = MatMul(noise, w)  flat = Add(a, b)
            grid = Reshape(flat, shape)
            first = Transpose<perm: ints = [0, 3, 1, 2]>(grid)
            up = ConvTranspose<strides: ints = [2, 2], pads: ints = [0, 0, 1, 1]>(first, u, v)
            act = Relu(up)
            c = Conv<pads: ints = [1, 1, 1, 1]>(act, k, l)
            p = Sigmoid(c)
            q = Mul(p, levels)
            last = Transpose<perm: ints = [0, 2, 3, 1]>(q)
            r = Round(last)
            images = Cast<to: int = 2>(r)
        }""",
        w=(4, 24), b=(24,), shape=np.array([-1, 2, 2, 6]), u=(6, 5, 3, 3), v=(5,), k=(3, 5, 3, 3), l=(3,),
        levels=np.array(255, np.float32),
    )  # fmt: skip
    optimise(made)
    assert [node.op_type for node in made.graph] == [
        "Gemm", "Reshape", "Relu", "Conv", "Sigmoid", "QuantizeLinear", "Transpose",
    ]  # fmt: skip
    again = optimise(made)
    assert {name: count for name, count in again.items() if count} == {"name_nodes": 7}
    assert len(PASSES) == len(again)
