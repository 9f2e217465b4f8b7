"""What the operations page, the dashboard and the alerts name is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import promql_parser as promql
import pytest
import yaml

from serve import Client, sample_cli
from serve.server.cli import main
from serve.server.settings import Settings
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from tests.conftest import assert_clear_error, command, metrics, serving

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "operations.md").read_text()
BOARD: dict[str, Any] = json.loads((DOCS / "grafana.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
MANIFESTS: dict[str, dict[str, Any]] = {
    each["kind"]: each
    for name in ("servers", "samples")
    for each in yaml.safe_load_all((DOCS / f"kubernetes/{name}.yaml").read_text())
}
BUF = {"--protocol", "--http2-prior-knowledge", "--reflect", "--reflect-header"}
PROMETHEUS = {"instance", "job"}  # labels that it adds
NAMES = r"balancedvae_\w+"

Labels = dict[str, set[str]]  # every value that was seen


@pytest.fixture(scope="module")
def exported(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Labels]:
    """The metrics of a server that has done a little of everything."""
    models = tmp_path_factory.mktemp("models")
    shutil.copy(smoke_bundle, models)
    (models / "broken.onnx").write_text("this is no model")
    log = tmp_path_factory.mktemp("log") / "log"
    with serving("--models", models, "--metrics", "127.0.0.1:0", log=log) as (address, _):
        assert command("python", "-m", "serve.healthcheck", address).returncode == 0
        with Client(address) as client:
            model = client.model()
            list(model.files(0, 0, 3))
            with pytest.raises(grpc.RpcError, match="count must be 1 or more"):
                client.stub.Sample(wire.SampleRequest())
        text = metrics(log)
    found: dict[str, Labels] = {"up": {}}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        series = found.setdefault(name, {})
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            series.setdefault(label, set()).add(value)
    return found


def parsed(text: str) -> promql.Expr:
    return promql.parse(text.replace("$__rate_interval", "5m").replace("$instance", ".*"))


def board() -> Iterator[tuple[str, str]]:
    """Each expression of the dashboard, and its legend."""
    for panel in BOARD["panels"]:
        yield from ((target["expr"], target["legendFormat"]) for target in panel["targets"])


def rules() -> Iterator[tuple[str, str]]:
    """Each rule's expression, and what it says."""
    yield from ((rule["expr"], " ".join(rule["annotations"].values())) for rule in RULES)


def queries() -> Iterator[tuple[str, str]]:
    """Each expression of the page."""
    for block in re.findall(r"```promql\n(.*?)```", PAGE, re.DOTALL):
        yield from ((text, "") for text in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", block, flags=re.MULTILINE)))


def result(node: Any, exported: dict[str, Labels]) -> set[str]:
    """Return the labels of an expression's result; every metric, label and value in it is exported."""
    if isinstance(node, promql.MatrixSelector):
        return result(node.vector_selector, exported)
    if isinstance(node, promql.VectorSelector):
        assert node.name in exported
        series = exported[node.name]
        for matcher in node.matchers.matchers:
            if matcher.name not in PROMETHEUS:
                assert matcher.name in series
                assert possible(matcher, series[matcher.name])
        return set(series) | PROMETHEUS
    if isinstance(node, promql.AggregateExpr):
        inside = result(node.expr, exported)
        kept = set(node.modifier.labels) if node.modifier else set()
        assert kept <= inside
        return kept
    if isinstance(node, promql.BinaryExpr):
        sides = [result(side, exported) for side in (node.lhs, node.rhs)]
        matching = node.modifier.matching if node.modifier else None
        for side in sides if matching else ():
            assert set(matching.labels) <= side
        return set.union(*sides)
    if isinstance(node, promql.Call):
        assert node.args
        labels = set.union(*(result(each, exported) for each in node.args))
        return labels - {"le"} if node.func.name == "histogram_quantile" else labels
    if isinstance(node, promql.ParenExpr):
        return result(node.expr, exported)
    assert isinstance(node, promql.NumberLiteral), type(node)
    return set()


def possible(matcher: promql.Matcher, seen: set[str]) -> bool:
    """Tell whether what a matcher looks for, or leaves out, exists."""
    if matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe):
        matching = [value for value in seen if re.fullmatch(matcher.value, value)]
        return len(matching) > 0 and (matcher.op == promql.MatchOp.Re or len(matching) < len(seen))
    return matcher.value in (grpc.StatusCode.__members__ if matcher.name == "code" else seen)


@pytest.mark.parametrize(("expression", "told"), [*board(), *rules(), *queries()])
def test_what_is_drawn_watched_and_asked_is_exported(expression: str, told: str, exported: dict[str, Labels]) -> None:
    labels = result(parsed(expression), exported)
    assert re.search(rf"\b({NAMES}|up)\b", expression)
    assert {name for pair in re.findall(r"\{\{(\w+)\}\}|\$labels\.(\w+)", told) for name in pair if name} <= labels


def test_everything_exported_is_drawn(exported: dict[str, Labels]) -> None:
    drawn = {family(name) for expression, _ in board() for name in re.findall(NAMES, expression)}
    assert drawn == {family(name) for name in exported} - {"up"}


def family(name: str) -> str:
    return re.sub("_(bucket|sum|count)$", "", name)


def test_every_rule_says_what_happened_and_how_bad_it_is() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert "__inputs" not in BOARD
    assert BOARD["schemaVersion"] >= 38  # Grafana 10
    assert [each["type"] for each in BOARD["templating"]["list"]] == ["datasource", "query"]
    assert set(re.findall(r'"uid": "([^"]*)"', json.dumps(BOARD))) == {BOARD["uid"], "${datasource}"}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_panels_have_places_of_their_own() -> None:
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_the_pages_table_is_what_is_exported(exported: dict[str, Labels]) -> None:
    rows = re.findall(r"^\| (`balancedvae_[^|]*)\|[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    written = {
        name: set(re.findall(r"\w+", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }
    series = {family(name): set(labels) - {"le"} for name, labels in exported.items() if name != "up"}
    assert written == series


def test_the_pages_status_codes_are_the_services() -> None:
    said = (ROOT / "protos/balancedvae/sampling/v1/sampling.proto").read_text()
    codes = set(re.findall(r"^//   ([A-Z_]{5,}) ", said, re.MULTILINE))
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, re.MULTILINE)) == codes
    assert codes <= set(grpc.StatusCode.__members__)


def test_the_page_names_every_flag_and_no_other() -> None:
    flags, probe = (
        set(re.findall(r"^ +(--[a-z0-9-]+)", command(*words, "--help").stdout, re.MULTILINE)) - {"--version", "--help"}
        for words in (["serve-vae"], ["python", "-m", "serve.healthcheck"])
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PAGE)) - BUF - {"--help"}
    assert named == flags | probe


def test_what_supervisors_start_are_settings_that_go_together() -> None:
    (unit,) = re.findall(r"^ExecStart=(.*)$", PAGE, re.MULTILINE)
    pod = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
    for words in (shlex.split(unit), pod["containers"][0]["args"]):
        assert Path(words[0]).name == "serve-vae"
        flags = main.make_context("serve-vae", words[1:]).params
        settings = Settings(**{name: value for name, value in flags.items() if name not in ("check", "new_token")})
        assert settings.models is not None
        assert settings.metrics.endswith(":9470")
    assert settings.listen.endswith(f":{pod['containers'][0]['readinessProbe']['grpc']['port']}")
    assert settings.grace < min(
        pod["terminationGracePeriodSeconds"], *map(int, re.findall("TimeoutStopSec=(.*)", PAGE))
    )


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_are_what_kubernetes_takes(kind: str) -> None:
    kubernetes_validate.validate(MANIFESTS[kind], kubernetes_validate.latest_version(), strict=True)


def test_manifests_know_each_other(exported: dict[str, Labels]) -> None:
    service, deployment, budget, scaler, job = MANIFESTS.values()
    template = deployment["spec"]["template"]
    labels, (server,) = template["metadata"]["labels"], template["spec"]["containers"]
    assert service["spec"]["selector"] == labels
    assert [each["spec"]["selector"]["matchLabels"] for each in (deployment, budget)] == [labels, labels]
    assert {each["port"] for each in service["spec"]["ports"]} == {server["readinessProbe"]["grpc"]["port"]}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == "9470"
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = (each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"])
    assert metric in exported
    (values,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "scale.md").read_text(), re.DOTALL)
    (rule,) = yaml.safe_load(values)["rules"]["custom"]
    assert rule["seriesQuery"].startswith(metric + "{")

    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    name, *words = [word.replace("$(JOB_COMPLETION_INDEX)", "7") for word in container["args"]]
    assert sample_cli.main.make_context(name, words).params["part"] == (7, spec["completions"])
    *_, rule = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_environment_variables_are_options(smoke_bundle: Path, tmp_path: Path) -> None:
    other = shutil.copy(smoke_bundle, tmp_path / "other@2.onnx")
    two = {"SERVE_VAE_MODEL": f"{smoke_bundle}:{other}", "SERVE_VAE_DEVICE": "cpu cpu", "SERVE_VAE_CHECK": "1"}
    kubernetes = {"SERVE_VAE_PORT": "tcp://10.0.0.1:8470", "SERVE_VAE_SERVICE_HOST": "10.0.0.1"}
    checked = command("serve-vae", **two, **kubernetes)
    assert checked.returncode == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["other version 2", "smoke version 1"]
    assert [", called smoke on its card" in line for line in lines[:2]] == [True, False]
    unknown = command("serve-vae", "--check", SERVE_VAE_MAXBATCH="64")
    assert_clear_error(unknown, "SERVE_VAE_MAXBATCH; did you mean SERVE_VAE_MAX_BATCH?", code=2)
    assert_clear_error(command("serve-vae", "--check", SERVE_VAE_ADMIN="1"), "--models FOLDER", code=2)
