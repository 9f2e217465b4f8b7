"""A Triton model repository: what Triton's own schema reads of it."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2

from export.bundles.triton import config, service, write_repository
from export.errors import ExportError
from serve.bundle import Bundle, load
from serve.errors import BundleError
from serve.stubs.onnx.v1 import model_pb2 as onnx
from tests.conftest import assert_clear_error, inside


@pytest.fixture
def bundle() -> Bundle:
    return load()


def named(bundle: Bundle, name: str) -> Bundle:
    return dataclasses.replace(bundle, card=dataclasses.replace(bundle.card, name=name))


def test_triton_reads_the_config(bundle: Bundle) -> None:
    read = text_format.Parse(config(bundle), model_config_pb2.ModelConfig())
    assert (read.name, read.backend, read.max_batch_size) == ("faces", "onnxruntime", 256)
    assert [(each.name, each.data_type, list(each.dims)) for each in read.input] == [
        ("noise", model_config_pb2.TYPE_FP32, [64])
    ]
    assert [(each.name, each.data_type, list(each.dims)) for each in read.output] == [
        ("images", model_config_pb2.TYPE_UINT8, [64, 64, 3])
    ]
    batching = read.dynamic_batching
    assert max(batching.preferred_batch_size) <= read.max_batch_size
    assert batching.max_queue_delay_microseconds > 0
    policy = batching.default_queue_policy  # Triton's own default is without bounds
    assert policy.max_queue_size > 0
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.default_timeout_microseconds > batching.max_queue_delay_microseconds
    assert [each.batch_size for each in read.model_warmup] == list(batching.preferred_batch_size)
    assert list(read.model_warmup[0].inputs["noise"].dims) == [64]
    assert read.parameters["bundle_sha256"].string_value == bundle.digest


def test_latents_are_an_output_where_the_bundle_has_them(bundle: Bundle) -> None:
    model = onnx.Model.FromString(bundle.data)
    latents = model.graph.output.add(name="latents")
    latents.type.tensor_type.elem_type = 1
    latents.type.tensor_type.shape.dim.add(dim_param="batch")
    latents.type.tensor_type.shape.dim.add(dim_value=bundle.card.latent_size)
    both = dataclasses.replace(bundle, data=model.SerializeToString())
    read = text_format.Parse(config(both), model_config_pb2.ModelConfig())
    assert [(each.name, each.data_type, list(each.dims)) for each in read.output] == [
        ("images", model_config_pb2.TYPE_UINT8, [64, 64, 3]),
        ("latents", model_config_pb2.TYPE_FP32, [bundle.card.latent_size]),
    ]


def test_a_repository_holds_what_the_bundles_are(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "Models_1"
    written = write_repository([bundle, named(bundle, "other.v2")], folder, force=False)
    assert sorted(path.name for path in folder.iterdir()) == ["faces", "other.v2"]
    assert (folder / "faces" / "1" / "model.onnx").read_bytes() == bundle.data
    assert written[-1] == tmp_path / "Models_1-kserve.yaml"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Models_1", "Models_1-kserve.yaml"]
    resource = yaml.safe_load(written[-1].read_text())
    assert resource["kind"] == "InferenceService"
    assert resource["metadata"]["name"] == "models-1"
    assert resource["metadata"]["annotations"] == {"balanced-vae/bundles": "faces,other.v2"}
    model = resource["spec"]["predictor"]["model"]
    assert (model["protocolVersion"], model["ports"][0]["containerPort"]) == ("v2", 9000)


def test_what_was_filled_in_stays_and_all_models_are_named(bundle: Bundle, tmp_path: Path) -> None:
    write_repository([bundle], tmp_path / "models", force=False)
    resource = tmp_path / "models-kserve.yaml"
    resource.write_text(resource.read_text().replace("REPLACE-ME", "s3://mine/models"))
    write_repository([named(bundle, "another")], tmp_path / "models", force=False)
    said = yaml.safe_load(resource.read_text())
    assert said["metadata"]["annotations"] == {"balanced-vae/bundles": "another,faces"}
    assert said["spec"]["predictor"]["model"]["storageUri"] == "s3://mine/models"


def test_a_model_that_cannot_be_replaced_stays(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository([bundle], tmp_path / "models", force=False)
    rename, asked = Path.rename, []

    def fails_once(path: Path, target: Path) -> Path:
        asked.append(target)
        if len(asked) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        write_repository([dataclasses.replace(bundle, digest="newer")], tmp_path / "models", force=True)
    assert bundle.digest in (tmp_path / "models" / "faces" / "config.pbtxt").read_text()


def test_the_folder_may_be_a_mount(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container's volume: names change within one file system alone."""
    (tmp_path / "models").mkdir()
    rename = Path.rename

    def within(path: Path, target: Path) -> Path:
        if (tmp_path / "models" in path.parents) != (tmp_path / "models" in target.parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "models")
    monkeypatch.setattr(Path, "rename", within)
    write_repository([bundle], tmp_path / "models", force=False)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["faces"]


def test_the_folder_may_be_the_one_at_hand(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    write_repository([bundle], Path("."), force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "models-kserve.yaml"]


@pytest.mark.parametrize("name", ["../faces", "a b", "", ".hidden", 'a"', "x" * 65])
def test_names_that_cannot_be_served_write_nothing(bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="Received: "):
        write_repository([bundle, named(bundle, name)], tmp_path / "models", force=False)
    assert not list(tmp_path.iterdir())


def test_a_failure_keeps_what_was_there(bundle: Bundle, tmp_path: Path) -> None:
    write_repository([bundle], tmp_path / "models", force=False)
    broken = dataclasses.replace(named(bundle, "broken"), data=b"no ONNX")
    newer = dataclasses.replace(bundle, digest="newer")
    with pytest.raises(DecodeError):
        write_repository([newer, broken], tmp_path / "models", force=True)
    assert bundle.digest in (tmp_path / "models" / "faces" / "config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "models-kserve.yaml"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["faces"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("Faces", "faces"), ("64x64", "models-64x64"), ("a_b.c", "a-b-c"), ("No", "no")]
)
def test_kubernetes_names(name: str, wanted: str) -> None:
    metadata = yaml.safe_load(service(name, [Path("1.0")]))["metadata"]
    assert metadata["name"] == wanted
    assert metadata["annotations"] == {"balanced-vae/bundles": "1.0"}  # text, as Kubernetes insists


def test_models_are_replaced_when_told_only(bundle: Bundle, tmp_path: Path) -> None:
    write_repository([bundle], tmp_path / "models", force=False)
    with pytest.raises(ExportError, match="--force"):
        write_repository([bundle], tmp_path / "models", force=False)
    (tmp_path / "models" / "faces" / "old").touch()
    write_repository([bundle], tmp_path / "models", force=True)
    assert not (tmp_path / "models" / "faces" / "old").exists()
    with pytest.raises(ExportError, match="names of their own"):
        write_repository([bundle, bundle], tmp_path / "two", force=False)
    assert not (tmp_path / "two").exists()


def test_the_command_writes_one(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["export-onnx", smoke_bundle, "--out", tmp_path / "m.onnx", "--triton-repository", tmp_path / "models"]
    result = inside(*words)
    assert result.returncode == 0, result.stderr
    model = tmp_path / "models" / "m" / "1" / "model.onnx"
    assert model.read_bytes() == (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").unlink()
    assert_clear_error(inside(*words), "--force")
    assert not (tmp_path / "m.onnx").exists()
    (tmp_path / "file").touch()
    assert_clear_error(inside(*words[:-1], tmp_path / "file" / "models"), f"{tmp_path}/file is a file; a repository")
    assert not (tmp_path / "m.onnx").exists()
    assert_clear_error(inside(*words[:-1], tmp_path / ("m" * 300)), "File name too long")
    long = tmp_path / ("m" * 250)  # itself a possible name, but not with what goes beside it
    result = inside(*words[:-1], long)
    assert_clear_error(result, f"cannot write {long}: File name too long")
    assert (tmp_path / "m.onnx").exists()  # and is named before
    assert f"{tmp_path}/m.onnx: " in result.stdout
