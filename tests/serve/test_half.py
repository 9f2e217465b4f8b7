"""The graph that tensor cores take: float16 where the work is, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from serve import load
from serve.bundle import EMBEDDED
from serve.devices import CPU, Device, graph, open_session
from serve.half import halved
from serve.noise import draw
from serve.pads import symmetric
from tests.conftest import inside


def inferred(data: bytes) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return a model and the element type of each of its values."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), strict_mode=True, data_prop=True)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    types = {each.name: each.type.tensor_type.elem_type for each in values}
    return model, types | {each.name: each.data_type for each in model.graph.initializer}


@pytest.mark.parametrize("precision", list(EMBEDDED))
def test_convolutions_take_and_give_float16_and_the_rest_float32(precision: str) -> None:
    model, types = inferred(halved(load(EMBEDDED[precision]).data))
    assert (types["noise"], types["images"]) == (TensorProto.FLOAT, TensorProto.UINT8)
    convolutions = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert len(convolutions) > 10
    for node in convolutions:
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name
    for node in model.graph.node:
        if node.op_type in ("Gemm", "Sigmoid", "QuantizeLinear"):
            assert types[node.input[0]] == TensorProto.FLOAT, node.name
    if precision == "fp32":  # in int8 what is between them is rounded, in float32
        casts = [node.name for node in model.graph.node if node.op_type == "Cast"]
        assert len([name for name in casts if "weight" not in name and "bias" not in name]) <= 4, casts


@pytest.mark.parametrize("precision", list(EMBEDDED))
def test_its_pictures_are_those_of_the_file_nearly(precision: str) -> None:
    data = load(EMBEDDED[precision]).data
    noise = draw(5, 0, 16, 64)
    half, whole = (open_session(each, CPU).run(["images"], {"noise": noise})[0] for each in (halved(data), data))
    apart = np.abs(half.astype(int) - whole)
    assert 0 < apart.mean() < 0.7
    if precision == "fp32":
        assert apart.max() <= 1


def test_a_file_that_computes_in_float16_stays_as_it_is(smoke_bundle: Path, tmp_path: Path) -> None:
    inside("export-onnx", smoke_bundle, "--out", tmp_path / "half.onnx", "--precision", "fp16", "--count", 64)
    data = load(tmp_path / "half.onnx").data
    _, types = inferred(halved(data))
    assert TensorProto.FLOAT16 in types.values()
    noise = draw(5, 0, 16, 8)
    half, whole = (open_session(each, CPU).run(["images"], {"noise": noise})[0] for each in (halved(data), data))
    np.testing.assert_array_equal(half, whole)


def test_a_device_loads_the_file_as_it_takes_it(smoke_bundle: Path) -> None:
    data = smoke_bundle.read_bytes()
    assert graph(data, CPU) == graph(data, Device("openvino"), "bfloat16") == data
    for kind in ("cuda", "tensorrt"):
        assert graph(data, Device(kind)) == symmetric(data)
    assert graph(data, Device("cuda"), "float16") == halved(symmetric(data))
    assert graph(data, Device("tensorrt"), "float16") == symmetric(data)
