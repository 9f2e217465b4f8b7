"""What holds for every command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import BIN, HOMES, assert_clear_error, command

HEAVY = ("tensorflow", "keras", "onnxruntime", "onnx", "grpc", "numpy", "rich", "matplotlib", "sklearn", "scipy")


@pytest.mark.parametrize("name", HOMES)
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; from {HOMES[name]} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("name", HOMES)
def test_version_and_wrong_flags(name: str) -> None:
    assert "0.1.0" in command(name, "--version").stdout
    assert_clear_error(command(name, "--no-such-flag"), "No such option", code=2)


@pytest.mark.parametrize(
    ("group", "commands", "options"),
    [
        ("evaluate-vae", ["measure", "compare"], ["--features", "--count", "--prior", "--data"]),
        ("export-onnx", ["export", "inspect", "diff"], ["--out", "--precision", "--prior", "--features"]),
    ],
)
def test_a_groups_help_shows_its_commands_and_its_defaults_options(
    group: str, commands: list[str], options: list[str]
) -> None:
    shown, own = command(group, "--help").stdout, command(group, commands[0], "--help").stdout
    assert f"Usage: {group} [OPTIONS] RUN_OR_BUNDLE | COMMAND" in shown
    for each in commands:
        assert f"\n  {each}" in shown
    for option in options:
        (line,) = re.findall(rf"^  {option} .*$", own, re.MULTILINE)
        assert f"\n{line}\n" in shown
    assert "--features" in command(group, "anything", "--help").stdout
    assert_clear_error(command(group, "--features", "f.onnx"), "Missing argument", code=2)  # the default's, unnamed


@pytest.mark.parametrize(
    "words",
    [
        *HOMES,
        "evaluate-vae measure",
        "evaluate-vae compare",
        "export-onnx export",
        "export-onnx inspect",
        "export-onnx diff",
        "python -m serve.healthcheck",
    ],
)
def test_help_says_what_each_option_does(words: str) -> None:
    result = command(*words.split(), "--help", COLUMNS="100")
    assert result.returncode == 0, result.stderr
    assert '[default: ""]' not in result.stdout
    said = dict(re.findall(r"^  (--\S+).*?\s{2,}(.*(?:\n {10,}.*)*)", result.stdout, re.MULTILINE))
    assert "--help" in said
    for option, text in said.items():
        sentence = " ".join(re.sub(r"\[(default|env var|required|\d).*?\]\s*$", "", text, flags=re.DOTALL).split())
        assert re.fullmatch(r"[A-Z].*\w.*\.", sentence), (option, text)
        assert len(sentence.split()) >= 3, (option, text)


def light() -> set[str]:
    """The packages that `pip install '.[cpu]'` brings."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    left = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    found: set[str] = set()
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            left += requires(name) or []
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed")
    return found


LIGHT = """
import json
import sys
from importlib import import_module

absent = set(json.loads(sys.argv.pop(1)))


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import_module(sys.argv.pop(1)).main()
"""


@pytest.fixture(scope="module")
def absent() -> str:
    """Modules that a light install lacks, of those that are here."""
    ours, here = {"balanced_vae", "training", "export", "serve"}, light()
    modules = packages_distributions().items()
    return json.dumps([name for name, by in modules if name not in ours and not here & set(map(canonicalize_name, by))])


def lightly(absent: str, name: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as in an install without extras: their packages cannot be imported."""
    full = [BIN / "python", "-c", LIGHT, absent, HOMES[name], *map(str, words)]
    return subprocess.run(full, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_light_install_samples(absent: str, tmp_path: Path) -> None:
    result = lightly(absent, "sample-cli", "--n", 1, "--out", tmp_path / "faces")
    assert result.returncode == 0, result.stderr


def test_runs_are_compared_without_what_trains_them(absent: str, tmp_path: Path) -> None:
    assert {"tensorflow", "keras", "scipy"} <= set(json.loads(absent))
    reference = {"data": "c" * 32, "split": "train", "count": 60, "of": 90, "read": "16x16x3"}
    extractor = {"name": "tiny", "digest": "d" * 64, "features": 8, "resize": "in the model"}
    record = {"metric": "FD (tiny)", "set": "GEN-1", "value": 12.5, "seed": 0, "count": 60}
    record |= {"reference": reference, "extractor": extractor}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"recipe": {"name": "smoke"}}))
    (tmp_path / "run" / "metrics.json").write_text(json.dumps([record]))
    (tmp_path / "bundle.json").write_text(json.dumps({"name": "b.onnx", "recipe": {}, "records": [record]}))
    result = lightly(absent, "evaluate-vae", "compare", tmp_path / "run", tmp_path / "bundle.json")
    assert result.returncode == 0, result.stderr
    assert "12.5" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train-vae", "--recipe", "smoke", "--data", ".", "--out", "run"], "train"),
        (["evaluate-vae", ".", "--data", ".", "--features", "f.onnx"], "cpu,train"),
        (["export-onnx", ".", "--out", "x.onnx"], "cpu,export"),
        (["export-onnx", "inspect", "x.onnx"], "cpu,export"),
        (["export-onnx", "diff", "x.onnx", "x.onnx"], "cpu,export"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_a_light_install_says_which_extra_a_command_takes(absent: str, words: list[str], extra: str) -> None:
    result = lightly(absent, *words)
    assert_clear_error(result, "No module named", f"install the extra: pip install '.[{extra}]' in the checkout")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("backend", "words"), [("jax", "pip install '.[jax]' (or jax-gpu)"), ("torch", "pip install '.[torch]' in")]
)
def test_a_backend_that_is_not_installed_has_an_extra_of_its_own(
    backend: str, words: str, pictures: Path, tmp_path: Path
) -> None:
    start = ("--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run")
    result = lightly(json.dumps([backend]), "train-vae", *start, KERAS_BACKEND=backend)
    assert_clear_error(result, f"No module named '{backend}'", f"install the extra: {words}", "in the checkout")
    assert not (tmp_path / "run").exists()


def test_a_backend_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "foo")
    for name, words in (("train-vae", "--recipe smoke --data x --out y"), ("export-onnx", ". --out x.onnx")):
        result = CliRunner().invoke(import_module(HOMES[name]).main, words.split())
        assert result.exit_code == 1
        expected = "KERAS_BACKEND must be one of tensorflow, jax, torch, or not be set. Received: 'foo'"
        assert result.output == f"Error: {expected}\n"


def test_a_reader_that_leaves_ends_a_command_without_a_word(pictures: Path, tmp_path: Path) -> None:
    """As `head` does. This command reads files too, and says what it could not read."""
    words = ["--recipe", "smoke", "--data", pictures, "--out", tmp_path / "run", "--dry-run"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        result = subprocess.run([BIN / "train-vae", *words], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 128 + signal.SIGPIPE
    assert [line for line in result.stderr.splitlines() if "48 train" not in line] == []
