"""A Triton model repository from bundles, and the KServe resources that serve it.

FOLDER/NAME/config.pbtxt
FOLDER/NAME/1/model.onnx
FOLDER-kserve.yaml         beside it: Triton takes what is in the folder for models
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.errors import ExportError
from serve.bundle import Bundle
from serve.stubs.onnx.v1 import model_pb2 as onnx
from training.files import replacing

TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8"}  # ONNX's element types
PREFERRED, LARGEST, DELAY = (32, 64), 256, 2000
# Triton's queue counts requests, whatever their size and the device's speed. A time-out in microseconds refuses what
# has waited too long, so that no client waits in vain.
QUEUE, PATIENCE = 1024, 5_000_000
CONFIG = """\
# {description}
name: "{name}"
backend: "onnxruntime"
max_batch_size: {largest}
{values}
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {delay}
  default_queue_policy {{
    max_queue_size: {queue}
    timeout_action: REJECT
    default_timeout_microseconds: {patience}
    allow_timeout_override: true
  }}
}}
# One instance on every GPU; on the CPU where there is none.
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
{warm_up}
parameters {{ key: "bundle_sha256" value {{ string_value: "{digest}" }} }}
# On NVIDIA GPUs TensorRT is faster, takes minutes to start, and rounds otherwise than other engines:
# optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {{ name: "tensorrt" }} ] }} }}
"""
VALUE = '{kind} [ {{ name: "{name}" data_type: {type} dims: [ {dims} ] }} ]'
WARM_UP = """\
model_warmup {{
  name: "batch{batch}"
  batch_size: {batch}
  inputs {{ key: "noise" value {{ data_type: TYPE_FP32 dims: [ {size} ] random_data: true }} }}
}}"""
NAMES = re.compile(r"balanced-vae/bundles: .*")
SERVICE = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: "{service}"
  annotations:
    balanced-vae/bundles: "{names}"
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      # Where you put the repository: s3://..., gs://..., pvc://...
      storageUri: REPLACE-ME
      ports:
        - name: h2c  # gRPC, where KServe's Triton runtime listens
          containerPort: 9000
          protocol: TCP
      resources:
        requests:
          cpu: "2"
          memory: 4Gi
        limits:
          cpu: "4"
          memory: 8Gi
          # nvidia.com/gpu: "1"
"""


def write_repository(bundles: Sequence[Bundle], folder: Path, force: bool) -> list[Path]:
    """Write a model folder for each bundle, and the KServe YAML beside the repository; return what was written.

    Of a YAML that is there already, only the list of models is changed.

    Args:
        bundles: Models; each is served by its card's name.
        folder: The repository; made where it is not there.
        force: Whether to replace models of the same name.

    Raises:
        ExportError: a model is there already, two bundles have one name, or the folder is a file or below one.
        OSError: it cannot be written.
    """
    folder = folder.resolve()  # "." has no name of its own
    names = [bundle.card.name for bundle in bundles]
    check_free(folder, names, force)
    homes = [folder / name for name in names]
    resource = folder.with_name(f"{folder.name}-kserve.yaml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the repository, as Triton takes what is in it for models; but names change within one file system alone.
    staging = folder if folder.is_mount() else folder.parent
    with tempfile.TemporaryDirectory(dir=staging, prefix=f".part-{folder.name}-") as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        for bundle in bundles:
            version = new / bundle.card.name / "1"
            version.mkdir(parents=True)
            (version / "model.onnx").write_bytes(bundle.data)
            (version.parent / "config.pbtxt").write_text(config(bundle))
        served = {path.parent for path in folder.glob("*/config.pbtxt")} | set(homes)
        text = service(folder.name, sorted(served))
        if resource.exists():  # whoever filled it in keeps it: only the list of models changes
            text = NAMES.sub(NAMES.findall(text)[0], resource.read_text("utf-8", "surrogateescape"))
        # All are written: what is left is renaming.
        old.mkdir()
        folder.mkdir(exist_ok=True)
        for home in homes:
            if home.exists():
                home.rename(old / home.name)
            try:
                (new / home.name).rename(home)
            except BaseException:
                if (old / home.name).exists():
                    (old / home.name).rename(home)
                raise
    with replacing(resource) as part:
        part.write_text(text, "utf-8", "surrogateescape")
    return [*homes, resource]


def check_free(folder: Path, names: Sequence[str], force: bool) -> None:
    """Raise ExportError where models of these names cannot be written to a repository."""
    if len(set(names)) < len(names):
        raise ExportError(f"models of a repository need names of their own. Received: {', '.join(names)}")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ExportError(f"{there} is a file; a repository of models is a folder")
    for name in names:
        if (folder / name).exists() and not force:
            raise ExportError(f"{folder / name} exists; pass --force to replace it")


def config(bundle: Bundle) -> str:
    """Return a bundle's config.pbtxt."""
    card, graph = bundle.card, onnx.Model.FromString(bundle.data).graph
    values = [("input", value) for value in graph.input] + [("output", value) for value in graph.output]
    lines = []
    for kind, value in values:
        tensor = value.type.tensor_type
        dims = ", ".join(str(side.dim_value) for side in tensor.shape.dim[1:])  # Triton leaves the batch out
        lines.append(VALUE.format(kind=kind, name=value.name, type=TYPES[tensor.elem_type], dims=dims))
    return CONFIG.format(
        description=f"noise, standard normal, to {'x'.join(map(str, card.image_shape))} pictures; {card.precision}",
        name=card.name,
        largest=LARGEST,
        values="\n".join(lines),
        preferred=", ".join(map(str, PREFERRED)),
        delay=DELAY,
        queue=QUEUE,
        patience=PATIENCE,
        warm_up="\n".join(WARM_UP.format(batch=batch, size=card.noise_size) for batch in PREFERRED),
        digest=bundle.digest,
    )


def service(name: str, homes: Sequence[Path]) -> str:
    """Return a KServe InferenceService for a repository."""
    # Kubernetes takes lower case letters, digits and hyphens, and begins with a letter.
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    names = ",".join(home.name for home in homes)
    return SERVICE.format(service=plain if plain[:1].isalpha() else f"models-{plain}".rstrip("-"), names=names)
