"""`import balanced_vae` and the console scripts: they work under one name that nothing else has."""

from __future__ import annotations

import os
import subprocess
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import balanced_vae
import export
import serve
from balanced_vae import check_not_hidden
from tests.conftest import BIN, assert_clear_error

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
USES = {
    "train-vae": ["training"],
    "evaluate-vae": ["training", "serve"],
    "export-onnx": ["export", "training", "serve"],
    "serve-vae": ["serve"],
    "sample-cli": ["serve"],
}
HEAVY = ("tensorflow", "keras", "onnxruntime", "onnx", "grpc", "numpy", "rich", "matplotlib", "sklearn", "scipy")


def script(name: str, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run what a console script runs, in a folder that Python looks into first."""
    module, _, function = SCRIPTS[name].partition(":")
    code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function} as main; sys.exit(main())"
    full = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([BIN / "python", "-c", code, *words], cwd=cwd, env=full, capture_output=True, text=True)


def test_every_script_is_one_of_ours() -> None:
    assert set(SCRIPTS) == set(USES)
    for target in SCRIPTS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", USES)
def test_help_is_the_commands_and_loads_nothing_heavy(name: str, tmp_path: Path) -> None:
    module, _, function = SCRIPTS[name].partition(":")
    code = (
        f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function} as main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    full = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([BIN / "python", "-c", code], cwd=tmp_path, env=full, capture_output=True, text=True)
    assert result.stdout.startswith(f"Usage: {name} "), result.stderr
    assert result.stdout.splitlines()[-1] == "LOADED []"


def stray(folder: Path, name: str, kind: str) -> Path:
    """Put something else of a package's name into a folder; return what Python finds there."""
    if kind == "module":
        path = folder / f"{name}.py"
    else:
        (folder / name).mkdir()
        path = folder / name / "__init__.py"
    path.write_text("print('not ours')\n")
    return path


@pytest.mark.parametrize("kind", ["module", "package"])
@pytest.mark.parametrize(("name", "package"), [(name, each) for name, packages in USES.items() for each in packages])
def test_a_script_refuses_in_one_line_where_another_package_hides_ours(
    name: str, package: str, kind: str, tmp_path: Path
) -> None:
    path = stray(tmp_path, package, kind)
    result = script(name, "--help", cwd=tmp_path)
    assert_clear_error(result, f"{path} hides the package {package} of balanced-vae", "rename it")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_what_stands_on_pythonpath_hides_too(tmp_path: Path) -> None:
    other, here = tmp_path / "other", tmp_path / "here"
    other.mkdir()
    here.mkdir()
    path = stray(other, "serve", "package")
    result = script("sample-cli", "--help", cwd=here, PYTHONPATH=f"{other}{os.pathsep}{ROOT}")
    assert_clear_error(result, f"{path} hides the package serve")


def test_what_a_command_does_not_use_is_in_nobodys_way(tmp_path: Path) -> None:
    """People keep folders called training or export; one without Python in it hides nothing."""
    stray(tmp_path, "training", "package")
    (tmp_path / "serve").mkdir()
    (tmp_path / "export").mkdir()
    result = script("sample-cli", "--n", "1", "--out", "faces", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "faces").glob("*.png"))) == 1


def test_the_api_says_it_too(tmp_path: Path) -> None:
    path = stray(tmp_path, "serve", "module")
    full = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import balanced_vae; balanced_vae.Engine"
    result = subprocess.run([BIN / "python", "-c", code], cwd=tmp_path, env=full, capture_output=True, text=True)
    assert f"ImportError: {path} hides the package serve" in result.stderr


def test_what_is_not_installed_says_so() -> None:
    with pytest.raises(ImportError, match="no_such_package of balanced-vae is not installed"):
        check_not_hidden("no_such_package")


@pytest.mark.parametrize("name", balanced_vae.__all__)
def test_every_name_is_its_packages_own(name: str) -> None:
    packages = [import_module(each) for each in ("serve", "training", "export")]
    owners = [version("balanced-vae")] if name == "__version__" else [getattr(each, name, None) for each in packages]
    assert getattr(balanced_vae, name) in owners


def test_a_shell_completes_every_name_before_anything_is_imported(tmp_path: Path) -> None:
    code = "import balanced_vae, sys; print(*dir(balanced_vae)); print('serve' in sys.modules)"
    full = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([BIN / "python", "-c", code], cwd=tmp_path, env=full, capture_output=True, text=True)
    names, imported = result.stdout.splitlines()
    assert {*balanced_vae.__all__, "Client", "Engine", "export", "load", "train", "__version__"} <= {*names.split()}
    assert imported == "False"


@pytest.mark.parametrize("package", [serve, export], ids=lambda package: package.__name__)
def test_what_a_package_exports_is_there(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing
