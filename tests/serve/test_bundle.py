"""What is accepted as a model file, and what each other file is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from serve.bundle import CARD_KEY, EMBEDDED, SCHEMA_KEY, check, load
from serve.errors import BundleError
from tests.conftest import assert_clear_error, command

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
    assert found["samples"] == 10_000
    assert found["mean"] <= 1.0
    assert abs(found["shift"]) <= 0.02
