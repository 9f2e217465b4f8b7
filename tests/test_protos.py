"""The wire contracts, and the stubs made of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.conftest import BIN

ROOT = Path(__file__).parents[1]
STUBS = ("sampling/v1/sampling.proto", "admin/v1/admin.proto", "onnx/v1/model.proto", "inference.proto")
FIRST_RELEASE = ROOT / "tests/data/protos-0.1.0.binpb"  # what `buf build protos -o FILE` made of it


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    files = [f"serve/stubs/{name}" for name in STUBS]
    include = [f"-Iserve/stubs=protos/{folder}" for folder in ("balancedvae", "inference")]
    subprocess.run([BIN / "python", "-m", "grpc_tools.protoc", *include, *out, *files], cwd=ROOT, check=True)
    committed = sorted((ROOT / "serve/stubs").rglob("*_pb2*.py*"))
    committed = [path for path in committed if path.suffix in (".py", ".pyi")]
    assert len(committed) == 11
    for path in committed:
        assert path.read_bytes() == (tmp_path / path.relative_to(ROOT)).read_bytes(), f"make protos: {path.name}"


def buf(*words: str | Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "buf", *words], cwd=root, capture_output=True, text=True)


def test_the_protos_are_buf_clean() -> None:
    result = buf("lint")
    assert result.returncode == 0, result.stdout + result.stderr


def test_clients_of_the_first_release_are_still_understood(tmp_path: Path) -> None:
    result = buf("breaking", "--against", FIRST_RELEASE)
    assert result.returncode == 0, result.stdout + result.stderr
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    changed = shutil.copytree(ROOT / "protos", tmp_path / "protos")
    proto = changed / "balancedvae/sampling/v1/sampling.proto"
    proto.write_text(proto.read_text().replace("uint64 seed = 2;", "uint64 seed = 20;"))
    result = buf("breaking", "--against", FIRST_RELEASE, root=tmp_path)
    assert result.returncode != 0
    assert "seed" in result.stdout
