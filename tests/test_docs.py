"""What README and docs show: links that lead somewhere, paths that exist, and commands that can be run as written."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest
from click_default_group import DefaultGroup

from serve import Client
from tests.conftest import BIN
from tests.test_commands import HOMES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md"))
)
PACKAGES = ("balanced_vae", "training", "export", "serve")
FOLDERS = (*PACKAGES, "benchmarks", "docs", "examples", "protos", "tests", "LICENSES")


def prose(text: str) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose((ROOT / page).read_text())):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    code = "\n".join(re.findall(r"`([^`\n]+)`", text)) + "\n" + "\n".join(re.findall(r"^    .*$", text, re.MULTILINE))
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", code):
        if "VERSION" not in path:
            assert list(ROOT.glob(path.rstrip("/."))), path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_python_names_exist(page: Path) -> None:
    """Names such as `serve.noise.draw` are a module's, or of something that is defined or exported there."""
    text = (ROOT / page).read_text()
    for name in set(re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", text)):
        words = name.split(".")
        length = max(n for n in range(1, len(words) + 1) if module(words[:n]))
        assert len(words) - length <= 1, name
        assert words[length:] == [] or words[length] in defined(words[:length]), name


def module(words: list[str]) -> Path | None:
    path = ROOT.joinpath(*words)
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.exists()), None)


def defined(words: list[str]) -> set[str]:
    """What a module defines, or its package exports; nothing is imported, as training takes seconds to."""
    path = module(words)
    assert path
    tree = ast.parse(path.read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}


STARTS = rf"(?:{'|'.join(HOMES)}|python (?:-P )?-m serve\.healthcheck|python benchmarks/\w+\.py)(?= |$)"


def shown() -> Iterator[tuple[Path, str]]:
    """Each command line of ours in a page's blocks, to be run as it is; variables and `docker run` may precede it."""
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for line in re.findall(rf"^ {{4,}}(?:\w+=\S+ |docker run .* balanced-vae )*({STARTS}.*)$", text, re.MULTILINE):
            yield page, " ".join(re.sub(r"\s#\s.*|\$\w+", "", line).split())  # a comment, the shell's variables


def mentioned() -> Iterator[tuple[Path, str]]:
    """Each of our commands with options in a page's sentences, and each row of README's table of commands."""
    for page in PAGES:
        text = re.sub(r"^    .*$", "", (ROOT / page).read_text(), flags=re.MULTILINE)
        for line in re.findall(rf"`({STARTS}[^`]*--[^`]*)`", text):
            yield page, " ".join(line.split())
        for name, options in re.findall(r"^\| `([\w-]+)` \|[^|]*->[^|]*\| (.*) \|$", text, re.MULTILINE):
            yield page, f"{name} {' '.join(re.findall('`(--[^`]*)`', options))}"


def named(lines: Iterator[tuple[Path, str]]) -> list[object]:
    return [pytest.param(line, id=f"{page}: {line}") for page, line in dict.fromkeys(lines)]


def parts(line: str) -> tuple[click.Command, list[str]]:
    """The click command of a command line, and its words."""
    words = shlex.split(line.removesuffix("&"))
    if words[0] in HOMES:
        name, words = HOMES[words[0]], words[1:]
    elif "-m" in words:
        name, words = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    else:
        name, words = f"benchmarks.{Path(words[1]).stem}", words[2:]
    return import_module(name).main, words


@pytest.mark.parametrize("line", named(shown()))
def test_a_command_takes_what_is_shown(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, words = parts(line)
    monkeypatch.chdir(tmp_path)
    for word in words:  # what it reads is there
        if word.startswith("runs/") or word.endswith("/"):
            (tmp_path / word).mkdir(parents=True, exist_ok=True)
        elif re.search(r"\.\w+$", word):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    context = main.make_context("shown", list(words))
    if isinstance(main, DefaultGroup) or (isinstance(main, click.Group) and words and words[0] in main.commands):
        name, chosen, rest = main.resolve_command(context, words)
        assert chosen is not None
        chosen.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", named(mentioned()))
def test_a_command_has_the_options_that_are_mentioned(line: str) -> None:
    main, words = parts(line.replace("\\|", " ").replace("[", " ").replace("]", " "))
    commands = [main, *(main.commands.values() if isinstance(main, click.Group) else ())]
    known = {name for each in commands for parameter in each.params for name in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_targets_and_tests_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    rules = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^ {4,}|`)make ([\w-]+)", text, re.MULTILINE)) <= set(" ".join(rules).split())
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), name


def test_the_readmes_python_runs(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "127.0.0.1:8470" in code
    names: dict[str, object] = {}
    exec(code.replace("127.0.0.1:8470", server).replace("1_000_000", "70"), names)
    with Client(server) as client:
        assert np.array_equal(np.asarray(names["images"])[-1], client.model().sample(7, 69, 1)[0])


def test_the_readmes_way_without_a_client_is_answered(server: str) -> None:
    block = re.search(r"(?:^    .*\n)*^    buf curl .*\n(?:^    .*\n)*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert block is not None
    lines = block[0].replace("\\\n", " ").replace("127.0.0.1:8470", server).strip().splitlines()
    said = []
    for line in lines:
        result = subprocess.run([BIN / "buf", *shlex.split(line)[1:]], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        said.append(result.stdout)
    assert len(said) == 2
    assert "balancedvae.sampling.v1.SamplingService/SampleStream" in said[0]
    assert '"files"' in said[1]
