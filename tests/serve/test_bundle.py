"""What is accepted as a model file, and what each other file is told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.bundle import CARD_KEY, EMBEDDED, SCHEMA_KEY, check, load
from serve.card import Card
from serve.errors import BundleError
from serve.text import quoted
from tests.conftest import assert_clear_error, command, last_line
from tests.serve.test_card import assert_fit, card_of, with_card

Change = Callable[[onnx.ModelProto], None]


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_in_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32))
    tensor.external_data.add(key="location", value="weights.bin")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))


def custom(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Run", ["noise"], ["x"], domain="com.evil"))


def nested(model: onnx.ModelProto) -> None:
    graph = onnx.helper.make_graph([], "then", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["noise"], ["x"], then_branch=graph))


def another_schema(model: onnx.ModelProto) -> None:
    next(each for each in model.metadata_props if each.key == SCHEMA_KEY).value = "99"


def no_card(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def broken_card(model: onnx.ModelProto) -> None:
    next(each for each in model.metadata_props if each.key == CARD_KEY).value = '{"name": "x"}'


def sparse(model: onnx.ModelProto) -> None:
    """A Constant whose sparse values are in another file."""
    node = onnx.helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    tensor = attribute.sparse_tensor
    tensor.dims.append(4)
    tensor.values.CopyFrom(onnx.TensorProto(data_type=1, dims=[1], name="values", data_location=1))
    tensor.values.external_data.add(key="location", value="secret.bin")
    tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.int64)))
    model.graph.node.append(node)


def sparse_weights(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().dims.append(1)


def tensors_in_an_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.TENSORS).tensors.add()


def another_type(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.TYPE_PROTO).tp.tensor_type.elem_type = 1


def reference(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.FLOAT).ref_attr_name = "y"


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="mine")


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def annotation(model: onnx.ModelProto) -> None:
    model.graph.quantization_annotation.add()


def of_a_later_onnx(model: onnx.ModelProto) -> None:
    """A field that no version has yet."""
    tensor = model.graph.initializer[0]
    tensor.MergeFromString(b"\xfa\x3f\x03abc")  # number 1023


def another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


def random(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["x"], shape=[1]))


def of_text(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer.add(data_type=onnx.TensorProto.STRING, name="words", dims=[1])
    tensor.string_data.append(b"word")


def of_doubles(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2), "doubles"))


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer.add(data_type=1, name="huge", dims=[2**30, 2**30])


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "pictures"


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["batch", 8]))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


BAD = {
    "external data": external,
    "(external data)": external_in_constant,
    "custom operator com.evil:Run": custom,
    "nested graph": nested,
    "schema is 99": another_schema,
    "it holds sparse weights": sparse,
    "holds sparse weights": sparse_weights,
    "Attribute field 10": tensors_in_an_attribute,
    "Attribute field 14": another_type,
    "Attribute field 21": reference,
    "local functions": function,
    "Model field 20": training,
    "Graph field 14": annotation,
    "Tensor field 1023": of_a_later_onnx,
    "only these": another_domain,
    "operator 'RandomNormal'": random,
    "Tensor field 6": of_text,
    "'doubles' should be float32": of_doubles,
    "'huge' should be 4,611,686,018,427,387,904 bytes": huge,
    "no card": no_card,
    "card cannot be read": broken_card,
    "its input should be noise [batch, 8]": second_input,
    "its output should be images": renamed_output,
    "its output should be images [batch, 16, 16, 3] and latents": second_output,
    "batch": fixed_batch,
}


@pytest.mark.parametrize("reason", BAD)
def test_a_file_that_breaks_the_schema_is_refused(reason: str, smoke_bundle: Path) -> None:
    model = onnx.load(smoke_bundle)
    check(model.SerializeToString())
    BAD[reason](model)
    with pytest.raises(BundleError) as error:
        check(model.SerializeToString())
    assert reason in str(error.value)


def test_commands_refuse_such_files_in_one_line(smoke_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("this is no model")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(smoke_bundle.read_bytes()[:-5000])
    for path, words in ((text, "not an ONNX file"), (cut, ""), (tmp_path / "absent.onnx", "No such file")):
        assert_clear_error(command("sample-cli", "--model", path, "--n", 1, "--out", tmp_path / "out"), words)
        assert_clear_error(command("serve-vae", "--model", path, "--listen", "127.0.0.1:0"), words)
    assert not (tmp_path / "out").exists()


def test_the_embedded_models_are_bundles_of_faces() -> None:
    bundles = {precision: load(path) for precision, path in EMBEDDED.items()}
    for precision, bundle in bundles.items():
        assert bundle.card.precision == precision
        assert bundle.card.image_shape == (64, 64, 3)
        assert "non-commercial" in bundle.card.licence
        assert bundle.card.verification["agreement"]
    assert [bundle.card.name for bundle in bundles.values()] == ["faces", "faces-int8"]
    assert load().digest == bundles["fp32"].digest
    assert sum(len(bundle.data) for bundle in bundles.values()) <= 25_000_000
    found = bundles["int8"].card.difference
    assert found["samples"] == 5_000
    assert found["mean"] <= 1.0
    assert abs(found["shift"]) <= 0.02


# Cards.


@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_whatever_a_files_bytes_are_it_is_a_bundle_or_refused(smoke_bundle: Path, data: st.DataObject) -> None:
    content = bytearray(smoke_bundle.read_bytes())
    places = st.integers(0, len(content))
    for _ in range(data.draw(st.integers(1, 4))):
        at, kind = data.draw(places), data.draw(st.sampled_from(("write", "insert", "cut", "copy", "end")))
        some = data.draw(st.binary(min_size=1, max_size=12))
        if kind == "write":
            content[at : at + len(some)] = some
        elif kind == "insert":
            content[at:at] = some
        elif kind == "cut":
            del content[at : data.draw(places)]
        elif kind == "copy":
            content[at:at] = content[data.draw(places) :][:2000]
        else:
            del content[at:]
    try:
        card = check(bytes(content))
    except BundleError as error:
        assert_fit(str(error))
    else:
        assert Card.from_json(card.to_json()) == card


# Memory, and files that are none.


def wire(number: int, content: bytes) -> bytes:
    """Return a protobuf field of some bytes."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return varint(number << 3 | 2) + varint(len(content)) + content


MANY = 10 * 2**20
SWELLING = {  # 20 MB each, which a parser makes gigabytes of
    "attributes": wire(7, wire(1, wire(4, b"Relu") + wire(5, b"") * MANY)),
    "initialisers": wire(7, wire(5, b"") * MANY),
    "nodes": wire(7, wire(1, b"") * MANY),
    "properties": wire(14, b"") * MANY,
    "integers": wire(7, wire(1, wire(4, b"Relu") + wire(5, wire(8, b"\x01" * 2 * MANY)))),
}


@pytest.mark.parametrize("what", SWELLING)
def test_a_small_file_takes_little_memory(what: str, tmp_path: Path) -> None:
    path = tmp_path / "swelling.onnx"
    path.write_bytes(b"\x08\x0a" + SWELLING[what])
    program = """
import resource, sys
from serve import BundleError, load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    load(sys.argv[1])
except BundleError as error:
    print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reason, mebibytes = result.stdout.splitlines()
    assert "over 100,000 pieces" in reason
    assert int(mebibytes) < 100  # five times the file, which is read whole


def test_a_file_beyond_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    path.touch()
    os.truncate(path, 2**31 - 1)
    program = """
import resource, sys
from serve import BundleError, load
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    load(sys.argv[1])
except BundleError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "not enough memory" in result.stdout, result.stderr


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    for path, words in (
        (tmp_path / "pipe.onnx", "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop.onnx", "symbolic links"),
        (tmp_path / ("x" * 300), "name too long"),
        (Path("a\0b"), "cannot read"),
        (tmp_path / "\udcff\n.onnx", "No such file"),
    ):
        with pytest.raises(BundleError) as error:
            load(path)
        assert words in str(error.value)
        assert str(error.value).isprintable()


def test_a_long_message_loses_its_middle_and_says_all_in_one_line() -> None:
    text = str(BundleError("begin\n" + "\x1b[31mred \ud800" * 20_001 + " end"))
    assert text.isprintable()
    assert len(text) <= 1000
    assert text.startswith(r"begin\n\x1b[31mred \ud800")
    assert text.endswith(" end")
    assert quoted("a\n" * 10**6, 20).startswith(r"'a\na\n")
    for value in ("a\n" * 10**6, ["\x1b" * 100] * 1000, {"a": {"b": {"c": 10**400}}}, b"\x00" * 1000):
        assert quoted(value).isprintable()
        assert len(quoted(value)) <= 80


def test_every_command_says_it_in_one_line(smoke_bundle: Path, tmp_path: Path) -> None:
    good = card_of(smoke_bundle)
    model = onnx.load(smoke_bundle)
    sparse(model)
    cases = {
        "image_shape must be": with_card(smoke_bundle, json.dumps({**good, "image_shape": [math.inf, 16, 3]})),
        "it is not JSON": with_card(smoke_bundle, "[" * 60_000),
        "name must be": with_card(smoke_bundle, json.dumps({**good, "name": "\x1b[2J\n" * 1000})),
        "sparse weights": bytes(model.SerializeToString()),
    }
    path = tmp_path / "bad.onnx"
    for words, data in cases.items():
        path.write_bytes(data)
        for line in (
            ("sample-cli", "--model", path, "--n", 1, "--out", tmp_path / "out"),
            ("serve-vae", "--model", path, "--check"),
            ("export-onnx", "inspect", path),
            ("export-onnx", "diff", smoke_bundle, path),
        ):
            result = command(*line)
            assert_clear_error(result, words)
            assert len(last_line(result)) < 500
