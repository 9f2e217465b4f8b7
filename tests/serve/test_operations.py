"""What the operations page, the dashboard and the alerts name is there."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from click import Context, Option

from serve import Client
from serve.errors import Rejected
from serve.server.cli import main
from tests.conftest import serving

DOCS = Path(__file__).parents[2] / "docs"
ADDED = {"instance", "job", "le"}  # by Prometheus and its histograms


@pytest.fixture(scope="module")
def exported(smoke_bundle: Path) -> dict[str, set[str]]:
    """The labels of every metric of a server that has done a little of everything."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with serving("--model", smoke_bundle, "--metrics", f"127.0.0.1:{port}") as (address, _):
        with Client(address) as client:
            model = client.model()
            list(model.files(0, 0, 3))
            with pytest.raises(Rejected):
                model.sample(0, 0, 0)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as reply:
            text = reply.read().decode()
    found: dict[str, set[str]] = {"up": set()}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def expressions() -> Iterator[str]:
    for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", expressions())
def test_what_is_drawn_and_watched_is_exported(expression: str, exported: dict[str, set[str]]) -> None:
    text = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
    promql_parser.parse(text)
    names = re.findall(r"\b(?:balancedvae_\w+|up)\b", text)
    assert names
    of_all = set().union(*(exported[name] for name in names)) | ADDED
    used = re.findall(r'(\w+)=~?"', text)
    used += [label for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(", ")]
    assert set(used) <= of_all


def test_every_rule_says_what_happened_and_how_bad_it_is() -> None:
    for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_have_places_of_their_own() -> None:
    board: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text())
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_the_pages_table_is_what_is_exported(exported: dict[str, set[str]]) -> None:
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if name != "up"}
    rows = re.findall(r"^\| (`balancedvae_[^|]*)\|[^|]*\|([^|]*)\|", (DOCS / "operations.md").read_text(), re.MULTILINE)
    written = {name: labels for names, labels in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(written) == families
    for name, labels in written.items():
        series = exported.get(name, set()) | exported.get(f"{name}_count", set())
        assert set(re.findall(r"\w+", labels)) == series, name


def test_the_page_names_flags_that_exist() -> None:
    flags = {name for option in main.get_params(Context(main)) if isinstance(option, Option) for name in option.opts}
    named = set(re.findall(r"`(?:serve-vae )?(?:\.\.\. )?(--[a-z-]+)", (DOCS / "operations.md").read_text()))
    assert named - flags == set()
    assert len(named) > 20
