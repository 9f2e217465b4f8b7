"""What is handed on: the wheel, its licences, and the checks before a release."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from serve.bundle import EMBEDDED, load
from tests.conftest import BIN

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("balanced_vae", "training", "export", "serve")
MODELS = ROOT / "LICENSES" / "LicenseRef-CelebA-Noncommercial.txt"


def copied() -> list[str]:
    """What the Dockerfile takes from the repository to make the package of."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of what a container is built from, with the setuptools that is installed here."""
    source = tmp_path_factory.mktemp("source")
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    words = [BIN / "python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, "."]
    result = subprocess.run(words, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_says_both_licences_and_holds_them(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert metadata["License-Expression"] == "Apache-2.0 AND LicenseRef-CelebA-Noncommercial"
        files = metadata.get_all("License-File")
        assert files == ["LICENSE", f"LICENSES/{MODELS.name}"]
        for file in files:
            kept = archive.read(f"{Path(name).parent}/licenses/{file}")
            assert kept == (ROOT / file).read_bytes()


def test_the_wheel_holds_all_modules_and_the_models_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packed = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert packed | {"serve/py.typed", "training/py.typed", "export/py.typed"} <= names
    assert {f"{script.partition(':')[0].replace('.', '/')}.py" for script in PROJECT["scripts"].values()} <= names
    assert {f"serve/bundles/{path.name}" for path in EMBEDDED.values()} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_docker_is_sent_what_it_copies() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    assert {f"!{name}" for name in copied()} <= set(sent)


def test_the_models_licence_is_for_every_embedded_model() -> None:
    text = MODELS.read_text()
    assert text.startswith(MODELS.stem)
    assert set(re.findall(r"serve/bundles/\S+\.onnx", text)) == {
        str(path.relative_to(ROOT)) for path in (ROOT / "serve" / "bundles").glob("*.onnx")
    }
    for path in EMBEDDED.values():
        assert "non-commercial research use only" in load(path).card.licence


def test_the_changelog_says_what_this_version_is() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert PROJECT["version"] in versions


def test_before_a_commit_and_in_ci_runs_make_check() -> None:
    assert (BIN / "pre-commit").exists(), "it is among the extra `dev`"
    path = ROOT / ".pre-commit-config.yaml"
    result = subprocess.run([BIN / "pre-commit", "validate-config", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    (repository,) = yaml.safe_load(path.read_text())["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"], hook["always_run"]) == ("local", "make check", True)
    assert "make check" in (ROOT / ".ci/run").read_text().splitlines()
