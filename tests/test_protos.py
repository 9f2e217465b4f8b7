"""The wire contracts, and the stubs made of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.conftest import BIN

ROOT = Path(__file__).parents[1]
STUBS = ("sampling/v1/sampling.proto", "onnx/v1/model.proto")


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    files = [f"serve/stubs/{name}" for name in STUBS]
    include = "-Iserve/stubs=protos/balancedvae"
    subprocess.run([BIN / "python", "-m", "grpc_tools.protoc", include, *out, *files], cwd=ROOT, check=True)
    committed = sorted((ROOT / "serve/stubs").rglob("*_pb2*.py*"))
    committed = [path for path in committed if path.suffix in (".py", ".pyi")]
    assert len(committed) == 5
    for path in committed:
        assert path.read_bytes() == (tmp_path / path.relative_to(ROOT)).read_bytes(), f"make protos: {path.name}"


def test_the_protos_are_buf_clean(tmp_path: Path) -> None:
    config = json.dumps({"version": "v2", "modules": [{"path": "protos"}], "lint": {"use": ["STANDARD"]}})
    result = subprocess.run([BIN / "buf", "lint", "--config", config], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
