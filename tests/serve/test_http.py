"""Pictures by URL: the same as by gRPC, at addresses that caches may keep."""

from __future__ import annotations

import io
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve import Engine, load
from serve.noise import between, draw
from serve.server.http.routes import ROUTES
from tests.conftest import metrics
from tests.serve.site import FOREVER, POST, Site
from tests.serve.test_models import until
from tests.serve.test_readers import metric


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle), "cpu")


def test_a_picture_is_what_its_address_says_and_is_made_once(http_site: Site, engine: Engine) -> None:
    led = http_site.ask("/v1/models/smoke/samples/7/100.png")
    assert (led.status, led.headers["Cache-Control"]) == (307, "max-age=60")
    place = f"/v1/digests/{engine.digest}/samples/7/100.png"
    assert led.headers["Location"] == place
    first = http_site.ask(place)
    assert (first.status, first.headers["Content-Type"], first.headers["Cache-Control"]) == (200, "image/png", FOREVER)
    assert np.array_equal(first.array(), engine.sample(7, 100, 1)[0])
    made = metric(http_site.log, 'samples_total{model="smoke"}')
    tag = first.headers["ETag"]
    assert tag.startswith('W/"')  # another engine's picture may differ by a grey level
    for match in (tag, f'"other", {tag}', "*", tag.removeprefix("W/")):
        again = http_site.ask(place, If_None_Match=match)
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    head = http_site.ask(place, "HEAD")
    assert (head.status, head.body, head.headers["ETag"]) == (200, b"", tag)
    assert metric(http_site.log, 'samples_total{model="smoke"}') == made
    assert http_site.ask(place, If_None_Match='"other"').body == first.body


def test_whatever_changes_a_picture_changes_its_tag(http_site: Site) -> None:
    tails = ("samples/7/100.png", "samples/7/101.png", "samples/8/100.png", "samples/7/100.webp")
    tails += ("samples/7/100.png?temperature=.5", "grid/7/100.png", "grid/7/100.png?rows=2", "between/7/100/101.webp")
    tails += ("between/7/100/101/1.webp", "between/7/100/101.webp?steps=3")
    tags = {http_site.follow(f"/v1/models/smoke/{tail}").headers["ETag"] for tail in tails}
    assert len(tags) == len(tails)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_every_format_shows_the_picture(kind: str, http_site: Site, engine: Engine) -> None:
    reply = http_site.follow(f"/v1/models/smoke/samples/{2**64 - 1}/{2**63 - 1}.{kind}?temperature=0.5")
    assert reply.headers["Content-Type"] == f"image/{kind}"
    wanted = engine.sample(2**64 - 1, 2**63 - 1, 1, 0.5)[0]
    off = np.abs(reply.array().astype(int) - wanted)
    assert off.mean() < 2 if kind == "jpeg" else off.max() == 0


def test_a_grid_is_samples_in_rows(http_site: Site, engine: Engine) -> None:
    reply = http_site.follow("/v1/models/smoke/grid/7/100.webp?columns=3&rows=2")
    images = engine.sample(7, 100, 6)
    wanted = np.concatenate([np.concatenate(list(images[at : at + 3]), axis=1) for at in (0, 3)])
    assert np.array_equal(reply.array(), wanted)


def test_a_way_leads_from_one_sample_to_another(http_site: Site, engine: Engine) -> None:
    size = engine.card.noise_size
    noise = between(draw(7, 1, 1, size)[0], draw(7, 5, 1, size)[0], 6)
    wanted = engine.decode(noise)
    assert np.array_equal(wanted[[0, -1]], np.concatenate([engine.sample(7, 1, 1), engine.sample(7, 5, 1)]))
    moving = Image.open(io.BytesIO(http_site.follow("/v1/models/smoke/between/7/1/5.webp?steps=6").body))
    assert moving.n_frames == 6 + 4  # and back
    for frame in range(6):
        moving.seek(frame)
        assert np.array_equal(np.asarray(moving.convert("RGB")), wanted[frame])
        still = http_site.follow(f"/v1/models/smoke/between/7/1/5/{frame}.png?steps=6")
        assert np.array_equal(still.array(), wanted[frame])


def test_a_range_comes_as_an_array(http_site: Site, engine: Engine) -> None:
    wanted = {"seed": "7", "start": 100, "count": 3000, "temperature": 0.5}  # digits may be text: 2^53 is not the end
    reply = http_site.ask("/v1/models/smoke/samples", "POST", wanted)
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/x-npy")
    assert int(reply.headers["Content-Length"]) == len(reply.body)
    assert np.array_equal(np.load(io.BytesIO(reply.body)), engine.sample(7, 100, 3000, 0.5))


def test_models_say_what_they_are(http_site: Site, engine: Engine) -> None:
    (listed,) = (said := json.loads(http_site.ask("/v1/models").body))["models"]
    assert said["grpc"].items() >= {"tls": False, "token": False}.items()
    assert said["grpc"]["address"] in http_site.log.read_text()
    assert not listed["in_browser"]
    assert (listed["name"], listed["digest"], listed["arithmetic"]) == ("smoke", engine.digest, "exact")
    assert listed["card"] == json.loads(engine.card.to_json())
    for path in ("/v1/models/smoke", f"/v1/digests/{engine.digest}"):
        assert json.loads(http_site.ask(path).body) == listed
    assert json.loads(http_site.ask("/healthz").body) == {"status": "SERVING"}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/nowhere", 404, "/openapi.json"),
        ("/v1/models/cats", 404, "model must be one of smoke"),
        ("/v1/models/cats/samples/1/1.png", 404, "model must be one of smoke"),
        ("/v1/models/smoke/samples/1/1.png?version=9", 404, "version must be one of 1"),
        (f"/v1/digests/{'0' * 64}/samples/1/1.png", 404, "no model here has this digest"),
        ("/v1/models/smoke/samples/1/1.gif", 404, "/openapi.json"),
        ("/v1/models/smoke/samples/-1/1.png", 404, "/openapi.json"),
        ("/v1/models/smoke/../../etc/passwd", 404, "/openapi.json"),
        ("/v1/models/%2e%2e%2fetc/samples/1/1.png", 404, "/openapi.json"),
        (f"/v1/models/smoke/samples/{2**64}/1.png", 400, "seed must be a whole number from 0 to"),
        (f"/v1/models/smoke/samples/1/{2**63}.png", 400, "index must be a whole number from 0 to"),
        ("/v1/models/smoke/samples/1/1.png?temperature=nan", 400, "temperature must be a number from 0 to 100"),
        ("/v1/models/smoke/samples/1/1.png?temperatur=1", 400, "the query takes temperature, version, each once"),
        ("/v1/models/smoke/samples/1/1.png?temperature=1&temperature=2", 400, "each once"),
        ("/v1/models/smoke/grid/1/1.png?columns=65", 400, "columns must be a whole number from 1 to 64"),
        ("/v1/models/smoke/between/1/1/2/7.png?steps=7", 400, "frame must be below steps, 7"),
        ("/v1/models/smoke/grid/1/1.png?columns=64&rows=64", 400, "a grid of this model has up to"),
    ],
)
def test_what_is_wrong_is_a_problem(http_site: Site, path: str, status: int, words: str) -> None:
    reply = http_site.ask(path)
    if reply.status == 307:
        reply = http_site.ask(reply.headers["Location"])
    assert reply.status == status, reply.body
    assert words in reply.problem()["detail"]
    assert reply.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "should be an object"),
        ({"seed": 1, "start": 0}, "should have count"),
        ({"seed": 1, "start": 0, "count": 0}, "count should be"),
        ({"seed": -1, "start": 0, "count": 1}, "seed should be"),
        ({"seed": 1.5, "start": 0, "count": 1}, "seed should be"),
        ({"seed": True, "start": 0, "count": 1}, "seed should be"),
        ({"seed": 1, "start": 2**63 - 1, "count": 2}, "start + count 2^63 or less"),
        ({"seed": 1, "start": 0, "count": 1, "cats": 1}, "Received: 'cats'"),
    ],
)
def test_what_is_posted_is_checked(http_site: Site, body: Any, words: str) -> None:
    reply = http_site.ask("/v1/models/smoke/samples", "POST", body)
    assert reply.status == 400
    assert words in reply.problem()["detail"]


def test_other_methods_and_large_bodies_are_refused(http_site: Site) -> None:
    wrong = http_site.ask("/v1/models", "DELETE")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "GET,HEAD")
    large = http_site.ask("/v1/models/smoke/samples", "POST", {"seed": "1" * 10_000})
    assert (large.status, "4096 bytes or fewer" in large.problem()["detail"]) == (400, True)
    assert http_site.ask("/page/galleryXjs").status == 404
    assert http_site.ask("/v1/models", Authorization="Bearer \xff").status == 200
    with http_site.connect() as connection:
        connection.sendall(b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 400")
    for noise in (b"\x16\x03\x01\x02\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n\0\r\n\r\n"):
        with http_site.connect() as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    assert http_site.ask("/healthz").status == 200


def test_who_leaves_is_computed_for_no_longer(http_site: Site) -> None:
    body = json.dumps({"seed": 1, "start": 0, "count": 10**9}).encode()
    with http_site.connect() as connection:
        head = POST + f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert metric(http_site.log, "held_samples") > 0
    until(lambda: metric(http_site.log, "held_samples") == 0)


def test_requests_are_counted_by_what_they_are(http_site: Site) -> None:
    http_site.follow("/v1/models/smoke/samples/7/1.png")
    http_site.ask("/cats")
    text = metrics(http_site.log)
    assert re.search(
        r'requests_total\{code="OK",method="GET /v1/digests/\{digest\}/samples/\{seed\}/\{index\}.\{kind\}"\} [1-9]',
        text,
    )
    assert re.search(r'requests_total\{code="UNIMPLEMENTED",method="unknown"\} [1-9]', text)
    methods = set(re.findall(r'requests_total\{code="\w+",method="([^"]+)"\}', text))
    assert methods <= {f"{route.method} {route.path}" for route in ROUTES} | {"unknown"}


def test_whatever_is_asked_is_answered_as_the_document_says(http_site: Site, engine: Engine) -> None:
    """Of the model that there is; and no more than a test has time for."""
    document = schemathesis.openapi.from_url(f"{http_site.url}/openapi.json")

    def answered(case: Any) -> None:
        for name, there in (("name", "smoke"), ("digest", engine.digest)):
            if name in case.path_parameters:
                case.path_parameters[name] = there
        for unlikely in ("version", "arithmetic"):
            case.query.pop(unlikely, None)
        if isinstance(case.body, dict):
            case.body["count"] = min(case.body["count"], 1000)
            case.body.pop("version", None)
        # What each value may be is not all: a frame is one of the steps, and a grid has a most.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    tried = 0
    for operation in document.get_all_operations():
        cases = operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        check = settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)(
            given(cases)(answered)
        )
        check()
        tried += 1
    assert tried == sum(route.listed for route in ROUTES) - 1  # schemathesis leaves out where the document came from
