"""What is handed on: the wheel, its licences, and the checks before a release."""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import yaml

from serve import healthcheck
from serve.address import loopback
from serve.bundle import EMBEDDED, load
from serve.server.cli import main
from serve.server.settings import Settings
from serve.version import VERSION
from tests.conftest import BIN

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("balanced_vae", "training", "export", "serve")
MODELS = ROOT / "LICENSES" / "LicenseRef-CelebA-Noncommercial.txt"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
GRACE = 10  # seconds that `docker stop` waits


def copied() -> list[str]:
    """What the Dockerfile takes from the repository to make the package of."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
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
    http = ROOT / "serve" / "server" / "http"
    there = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    there += [*(ROOT / name / "py.typed" for name in PACKAGES), *(http / "page").iterdir(), *http.glob("ort/*.gz")]

    assert {str(path.relative_to(ROOT)) for path in there} <= names
    assert {Path(name).suffix for name in names if "/ort/" in name} <= {".gz"}
    assert {f"{script.partition(':')[0].replace('.', '/')}.py" for script in PROJECT["scripts"].values()} <= names
    assert {f"serve/bundles/{path.name}" for path in EMBEDDED.values()} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_docker_is_sent_what_it_copies() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    assert {f"!{name}" for name in copied()} <= set(sent)


def settings(words: list[str]) -> Settings:
    """What a server that is started with these words would do."""
    assert words[0] == "serve-vae"
    flags = main.make_context(words[0], words[1:]).params
    return Settings(**{name: value for name, value in flags.items() if name not in ("check", "new_token")})


def test_the_image_starts_a_server_and_asks_that_one_for_its_health() -> None:
    command, probe = (
        json.loads(found) for found in re.findall(r"^(?:HEALTHCHECK .*)?CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[::-1]
    )
    started = settings(command)
    assert started.grace < GRACE
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert loopback(started.listen) == f"127.0.0.1:{port}"
    assert probe[:4] == ["python", "-P", "-m", "serve.healthcheck"]
    assert healthcheck.main.make_context("probe", probe[4:]).params["pid"] == 1


def test_an_edit_of_a_module_installs_no_package_again() -> None:
    """What comes before the first module is copied is kept; and what is installed is compiled."""
    before, _, after = DOCKERFILE.partition("\nCOPY balanced_vae")
    assert re.findall(r"^COPY (.*) \S+$", before.split("WORKDIR /src")[0], re.MULTILINE) == [
        "pyproject.toml requirements.lock"
    ]
    assert '".[${RUNTIME}]"' in before
    (install,) = re.findall(r"^RUN .*? install (.*)$", after, re.MULTILINE)
    assert install == "--no-cache-dir --no-deps --force-reinstall ."
    assert "--no-compile" not in DOCKERFILE


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """The repository's files in a service of compose.yaml, by where they are there."""
    parts = [volume.split(":") for volume in service["volumes"] if volume.startswith("./")]
    assert all(mode == ["ro"] for _, _, *mode in parts)
    return {target: source for source, target, *_ in parts}


def content(service: dict[str, Any], ending: str) -> Any:
    """The file of a service's configs whose name there ends so."""
    (name,) = (each["source"] for each in service["configs"] if each["target"].endswith(ending))
    return yaml.safe_load(COMPOSE["configs"][name]["content"])


def test_what_compose_starts_finds_each_other_and_the_files_of_docs() -> None:
    services = COMPOSE["services"]
    server, prometheus, grafana = (services[name] for name in ("server", "prometheus", "grafana"))
    started = settings(server["command"])
    assert started.grace < GRACE
    ports = {name: service["ports"][0].split(":") for name, service in services.items()}
    assert all(host == "127.0.0.1" for host, _, _ in ports.values())
    assert started.listen.endswith(f":{ports['server'][2]}")
    for service in (prometheus, grafana):
        for source in mounts(service).values():
            assert (ROOT / source).is_file(), source
        assert {each["source"] for each in service["configs"]} <= set(COMPOSE["configs"])

    scraped = content(prometheus, "/etc/prometheus/prometheus.yml")
    (job,) = scraped["scrape_configs"]
    assert f'job="{job["job_name"]}"' in (ROOT / "docs/alerts.yaml").read_text()
    assert job["static_configs"] == [{"targets": [f"server:{started.metrics.rpartition(':')[2]}"]}]
    assert [mounts(prometheus)[rules] for rules in scraped["rule_files"]] == ["./docs/alerts.yaml"]

    (source,) = content(grafana, "/datasources/prometheus.yml")["datasources"]
    url = urlparse(source["url"])
    assert (source["type"], url.hostname, str(url.port)) == ("prometheus", "prometheus", ports["prometheus"][2])
    (folder,) = (each["options"]["path"] for each in content(grafana, "/dashboards/files.yml")["providers"])
    (board,) = mounts(grafana)
    assert (mounts(grafana)[board], str(Path(board).parent)) == ("./docs/grafana.json", folder)
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == board


def test_what_is_said_to_install_can_be_installed() -> None:
    """From a checkout or a wheel: no index has balanced-vae. And README says what each extra is for."""
    extras = set(PROJECT["optional-dependencies"])
    folders = [*PACKAGES, "docs", "examples", "benchmarks"]
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    files += [path for name in folders for ending in ("py", "md") for path in (ROOT / name).rglob(f"*.{ending}")]
    for path in files:
        text = path.read_text()
        assert not re.findall(r"balanced[-_]vae\[", text), path
        for named in re.findall(r"'\.\[([a-z,-]+)\]'", text):
            assert set(named.split(",")) <= extras, (path, named)
    table = (ROOT / "README.md").read_text().split("| extra | for |")[1].split("\n\n")[0]
    assert {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in row[1:-1].split("`, `")
    } == extras
    assert f"balanced_vae-{VERSION}-py3-none-any.whl" in (ROOT / "README.md").read_text()


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
    assert PROJECT["version"] == VERSION
    assert VERSION in versions


def test_before_a_commit_and_in_ci_runs_make_check() -> None:
    assert (BIN / "pre-commit").exists(), "it is among the extra `dev`"
    path = ROOT / ".pre-commit-config.yaml"
    result = subprocess.run([BIN / "pre-commit", "validate-config", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    (repository,) = yaml.safe_load(path.read_text())["repos"]
    (hook,) = repository["hooks"]
    assert (repository["repo"], hook["entry"], hook["always_run"]) == ("local", "make check", True)
    assert "make check" in (ROOT / ".ci/run").read_text().splitlines()
