"""What the tests of training share: a cache of their own, and feature extractors."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SIDE = 16


RNG = np.random.default_rng(0)


def save(path: Path, nodes: list[onnx.NodeProto], taken: onnx.ValueInfoProto, given: onnx.ValueInfoProto) -> Path:
    constants = {
        "weights": RNG.standard_normal((8, 3, 4, 4)).astype(np.float32),
        "peak": np.float32(255),
        "few": np.int64([3]),
    }
    initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "features", [taken], [given], initialisers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def images(channels: object = 3, kind: int = TensorProto.UINT8, side: object = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("images", kind, ["n", side or "h", side or "w", channels])


def layers(*last: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Eight filters of 4x4, rectified, and their mean over the picture."""
    return [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "peak"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weights"], ["filtered"], strides=[2, 2]),
        helper.make_node("Relu", ["filtered"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        *last,
    ]


FLAT = helper.make_node("Flatten", ["pooled"], ["features"])


FEATURES = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 8])


@pytest.fixture(scope="module")
def extractor_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("extractors") / "tiny.onnx", layers(FLAT), images(), FEATURES)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up graph with the real one's nodes: pictures in at ExpandDims, fed at Mul, out at pool_3."""
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        decoded = tf.compat.v1.placeholder(tf.float32, [1, 20, 20, 3], "ExpandDims")
        resized = tf.compat.v1.image.resize_bilinear(decoded, [299, 299], name="ResizeBilinear")
        fed = tf.multiply(resized - 128.0, 1 / 128, name="Mul")
        pooled = tf.nn.avg_pool2d(fed, 74, 75, "VALID")  # 4x4 regions
        flat = tf.reshape(pooled, [-1, 1, 1, 48])
        weights = np.random.default_rng(0).standard_normal((1, 1, 48, 8)).astype(np.float32)
        tf.nn.relu(tf.nn.conv2d(flat, weights, 1, "VALID"), name="pool_3")
    path = tmp_path_factory.mktemp("inception") / "classify_image_graph_def.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "balanced-vae"
