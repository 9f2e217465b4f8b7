"""What a GPU is given of a bundle: the same pictures, of what CUDA has kernels for and nothing that runs on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.bundles.pack import pack, unpack
from export.precision.half import halve
from export.precision.quantise import calibrate, candidates, quantise
from serve.bundle import EMBEDDED, Bundle, load
from serve.devices import CPU, GPU_SETTINGS, Device, open_session, refused, runtime
from serve.noise import draw
from serve.pads import symmetric

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
BYTES = {TensorProto.UINT8, TensorProto.INT8}
# What the CUDA provider has kernels for, of what bundles are made of: by operator, the types of its first input. From
# docs/OperatorKernels.md of ONNX Runtime, for opset 18.
KERNELS = dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "BatchNormalization", "Relu", "Sigmoid", "Add"), FLOATS) | {
    **dict.fromkeys(("Cast", "Concat", "Reshape", "Slice", "Transpose"), FLOATS | BYTES),
    "QuantizeLinear": {TensorProto.FLOAT},
    "DequantizeLinear": BYTES,
}


@pytest.fixture(scope="module")
def bundles(smoke_bundle: Path) -> dict[str, Bundle]:
    """The embedded models, and a trained one in each precision."""
    smoke = load(smoke_bundle)
    model = unpack(smoke)
    graphs = {
        "fp16": halve(model),
        "int8": quantise(model, calibrate(model), [str(node.name) for node in candidates(model.graph)]),
    }
    others = {name: pack(graph, dataclasses.replace(smoke.card, precision=name)) for name, graph in graphs.items()}
    embedded = {f"faces-{name}": load(path) for name, path in EMBEDDED.items()}
    return {**embedded, "smoke-fp32": smoke, **{f"smoke-{name}": bundle for name, bundle in others.items()}}


def computed(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Yield the nodes that no runtime computes as it loads a graph, with the type of each one's first input."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    constants = {each.name for each in graph.initializer}
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info)}
    for node in graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
        else:
            yield node, types[node.input[0]]


@pytest.mark.parametrize("name", ["faces-fp32", "faces-int8", "smoke-fp32", "smoke-fp16", "smoke-int8"])
def test_a_gpu_is_given_only_what_cuda_has_kernels_for(bundles: dict[str, Bundle], name: str) -> None:
    model = onnx.load_model_from_string(symmetric(bundles[name].data))
    onnx.checker.check_model(model, full_check=True)
    nodes = list(computed(model))
    assert len(nodes) > 20
    for node, kind in nodes:
        assert kind in KERNELS.get(node.op_type, ()), f"{node.op_type} of type {kind}"
        if node.op_type == "ConvTranspose":
            values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            assert values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
            assert values["pads"][:2] == values["pads"][2:]


@pytest.mark.parametrize("name", ["faces-fp32", "faces-int8", "smoke-fp32", "smoke-fp16", "smoke-int8"])
def test_its_pictures_are_the_same_bytes(bundles: dict[str, Bundle], name: str) -> None:
    bundle = bundles[name]
    noise = draw(0, 0, 5, bundle.card.noise_size)
    ours, theirs = (
        open_session(data, CPU).run(["images"], {"noise": noise})[0] for data in (symmetric(bundle.data), bundle.data)
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["faces-int8", "smoke-int8"])
def test_a_runtime_set_for_gpus_widens_int8_weights_as_it_loads_them(
    bundles: dict[str, Bundle], name: str, tmp_path: Path
) -> None:
    options = runtime().SessionOptions()
    options.graph_optimization_level = runtime().GraphOptimizationLevel.ORT_ENABLE_BASIC  # what comes before devices
    options.optimized_model_filepath = str(tmp_path / "basic.onnx")
    for key in GPU_SETTINGS.keys() - {"session.disable_cpu_ep_fallback"}:
        options.add_session_config_entry(key, GPU_SETTINGS[key])
    runtime().InferenceSession(bundles[name].data, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "basic.onnx").graph
    constants = {each.name for each in graph.initializer}
    dequantised = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert dequantised
    assert not constants.intersection(dequantised)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [0, 0, 1, 1]},
        {"pads": [2, 0, 0, 1]},
        {"pads": [0, 1, 1, 1], "output_padding": [1, 0], "dilations": [1, 2]},
        {"pads": [1, 1, 1, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"pads": [0, 0, 0, 0], "output_shape": [6, 10]},
        {},
    ],
)
def test_any_transposed_convolution_gives_what_it_gave(attributes: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(size=(3, 4, 3, 3)).astype(np.float32), "w")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 3, 5])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4, None, None])
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], **attributes)
    graph = helper.make_graph([node], "g", [value], [result], [weight])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    x = rng.normal(size=(2, 3, 3, 5)).astype(np.float32)
    before, after = (open_session(each, CPU).run(None, {"x": x})[0] for each in (data, symmetric(data)))
    assert np.array_equal(before, after)


def test_what_would_run_on_the_cpu_is_an_error_in_one_line(smoke_bundle: Path) -> None:
    options = runtime().SessionOptions()
    options.log_severity_level = 4
    for key, value in GPU_SETTINGS.items():
        options.add_session_config_entry(key, value)
    elsewhere = [each for each in runtime().get_available_providers() if each != "CPUExecutionProvider"]
    if elsewhere != ["AzureExecutionProvider"]:
        pytest.skip("needs ONNX Runtime's CPU build, whose other provider has no kernels")
    with pytest.raises(Exception, match="CPU EP") as caught:
        runtime().InferenceSession(load(smoke_bundle).data, options, providers=elsewhere, enable_fallback=0)
    assert str(refused(caught.value, Device("cuda"), "it failed")) == (
        "the cuda:0 device cannot run this model by itself: a part of it would run on the CPU; export it again, or "
        "pass --device cpu"
    )
