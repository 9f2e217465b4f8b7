"""Pictures by URL: the same as by gRPC, at addresses that caches may keep, under the same rules."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve import Engine, load
from serve.noise import between, draw
from serve.server.http.gallery import ORT
from serve.server.http.routes import ROUTES, RUNTIME
from tests.conftest import assert_clear_error, command, metrics, serving
from tests.serve.test_models import until
from tests.serve.test_readers import metric
from tests.serve.test_security import Authority, authority, token  # noqa: F401 (a fixture)

POST = "POST /v1/models/smoke/samples HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
FOREVER = "public, max-age=31536000, immutable"


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def array(self) -> np.ndarray[Any, Any]:
        return np.asarray(Image.open(io.BytesIO(self.body)))

    def problem(self) -> dict[str, Any]:
        assert self.headers["Content-Type"].startswith("application/problem+json")
        found: dict[str, Any] = json.loads(self.body)
        assert found["status"] == self.status
        assert found["detail"]
        return found


@dataclass
class Site:
    """A server's HTTP side."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ask(
        self, path: str, method: str = "GET", body: Any = None, tls: ssl.SSLContext | None = None, **headers: str
    ) -> Reply:
        parts = urlsplit(self.url)
        assert parts.hostname
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=20, **({"context": tls} if tls else {}))
        try:
            data = None if body is None else json.dumps(body)
            given = {} if body is None else {"Content-Type": "application/json"}
            connection.request(
                method, path, data, given | {key.replace("_", "-"): value for key, value in headers.items()}
            )
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def follow(self, path: str, **headers: str) -> Reply:
        """Ask by a name, and then where that leads to."""
        led = self.ask(path, **headers)
        assert led.status == 307, led.body
        return self.ask(led.headers["Location"], **headers)

    def connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        return socket.create_connection((parts.hostname, parts.port), 20)


def site(log: Path, process: subprocess.Popen[bytes]) -> Site:
    (url,) = re.findall(r"pictures at (\S+)", log.read_text())
    return Site(url, process, log)


@pytest.fixture(scope="module")
def http_site(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log = tmp_path_factory.mktemp("http") / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--metrics", "127.0.0.1:0")
    with serving(*words, "--http", "127.0.0.1:0", log=log) as (_, process):
        yield site(log, process)


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


def test_tokens_and_their_allowances_hold_here_too(smoke_bundle: Path, tmp_path: Path) -> None:
    tokens, log = tmp_path / "tokens.toml", tmp_path / "log"
    alice = token(tokens, "alice", "samples_per_second = 10")
    words = ("--model", smoke_bundle, "--device", "cpu", "--tokens", tokens, "--http", "127.0.0.1:0")
    with serving(*words, log=log) as (_, process):
        found = site(log, process)
        for given in ({}, {"Authorization": "Bearer wrong"}):
            refused = found.ask("/v1/models", **given)
            assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert refused.problem()["code"] == "UNAUTHENTICATED"
        assert found.ask("/healthz").status == 200
        known = {"Authorization": f"Bearer {alice}"}
        grid = "/v1/models/smoke/grid/1/1.png?columns=10&rows=10"  # ten seconds' worth
        first = found.follow(grid, **known)
        assert (first.status, first.headers["Cache-Control"]) == (200, "private, max-age=31536000, immutable")
        full = found.follow(grid, **known)
        assert full.status == 429
        assert int(full.headers["Retry-After"]) >= 1


def test_tls_is_the_servers(smoke_bundle: Path, authority: Authority, tmp_path: Path) -> None:  # noqa: F811
    cert, key = authority.issue("server")
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--tls-cert", cert, "--tls-key", key, "--http", "127.0.0.1:0")
    with serving(*words, log=log) as (_, process):
        found = site(log, process)
        assert found.url.startswith("https://")
        context = ssl.create_default_context(cafile=authority.ca)
        assert found.ask("/healthz", tls=context).status == 200
        before = ssl.get_server_certificate(tuple(urlsplit(found.url).netloc.split(":")), ca_certs=authority.ca)  # type: ignore[arg-type]
        other = authority.issue("other")
        cert.write_bytes(other[0].read_bytes())
        key.write_bytes(other[1].read_bytes())

        def changed() -> bool:
            place: Any = tuple(urlsplit(found.url).netloc.split(":"))
            return ssl.get_server_certificate(place, ca_certs=authority.ca) != before

        until(changed)
        with pytest.raises(ssl.SSLError):
            found.ask("/healthz", tls=ssl.create_default_context())


def test_clients_show_certificates_of_the_authority_that_there_is_now(smoke_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    cert, key = old.issue("server")
    known = tmp_path / "known.pem"
    known.write_bytes(old.ca.read_bytes())
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", known)
    with serving(*words, "--http", "127.0.0.1:0", log=log) as (_, process):
        found = site(log, process)

        def taken(client: Authority) -> bool:
            context = ssl.create_default_context(cafile=old.ca)
            context.load_cert_chain(*client.issue("client"))
            try:
                return found.ask("/healthz", tls=context).status == 200
            except OSError:
                return False

        assert (taken(old), taken(new)) == (True, False)
        known.write_bytes(new.ca.read_bytes())
        assert (taken(old), taken(new)) == (False, True)
        key.write_text("no key")  # what was there before stays
        assert taken(new)
        assert "kept what was there before" in log.read_text()


def test_listening_has_grpcs_rules(tmp_path: Path) -> None:
    result = command("serve-vae", "--http", "0.0.0.0:0")
    assert_clear_error(result, "0.0.0.0:0 can be reached from other machines", "--insecure", code=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_clear_error(command("serve-vae", "--listen", "127.0.0.1:0", "--http", place), place, "in use")


def test_what_was_accepted_is_finished_after_sigterm(smoke_bundle: Path, tmp_path: Path, engine: Engine) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    with serving(*words, log=log) as (_, process):
        found = site(log, process)
        body = json.dumps({"seed": 1, "start": 0, "count": 30_000}).encode()
        with found.connect() as connection:
            head = POST + f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            reply = connection.makefile("rb")
            assert reply.readline().startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            until(lambda: "stopping" in log.read_text())
            late = found.ask("/v1/models")
            assert (late.status, late.problem()["code"]) == (503, "UNAVAILABLE")
            assert late.headers["Retry-After"] == "1"
            while reply.readline().strip():
                pass
            images = np.load(io.BytesIO(reply.read(30_000 * engine.sample(1, 0, 1).nbytes + 128)))
        assert np.array_equal(images[-10:], engine.sample(1, 29_990, 10))
        assert process.wait(timeout=30) == 0


def test_a_reader_that_reads_nothing_is_ended_once_others_need_its_room(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    with serving(*words, "--stall", 0.2, "--queue-samples", 3000, log=log) as (_, process):
        found = site(log, process)
        body = json.dumps({"seed": 1, "start": 0, "count": 10**9}).encode()
        with found.connect() as connection:
            head = POST + f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert connection.recv(100)

            def served() -> bool:
                return found.follow("/v1/models/smoke/grid/1/1.png?columns=40&rows=50").status == 200

            until(served)
            assert metric(log, "stalled_readers_total") == 1


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


def test_models_are_given_only_where_the_server_shares_them(
    http_site: Site, smoke_bundle: Path, engine: Engine, tmp_path: Path
) -> None:
    place = f"/v1/digests/{engine.digest}/model.onnx"
    kept = http_site.ask(place)
    assert (kept.status, "--share-models" in kept.problem()["detail"]) == (403, True)
    copy, log = tmp_path / "copy.onnx", tmp_path / "log"
    shutil.copy(smoke_bundle, copy)
    with serving("--model", copy, "--device", "cpu", "--http", "127.0.0.1:0", "--share-models", log=log) as (
        _,
        process,
    ):
        found = site(log, process)
        given = found.ask(place)
        assert (given.status, given.headers["Cache-Control"], given.body) == (200, FOREVER, copy.read_bytes())
        assert int(found.ask(place, "HEAD").headers["Content-Length"]) == len(given.body)
        assert found.ask(place, If_None_Match=given.headers["ETag"]).status == 304
        copy.write_bytes(b"something else")
        assert found.ask(place).body == given.body  # what was loaded, whatever became of the file
        digest = {
            "digest": engine.digest,
            "name": "smoke",
            "seed": 1,
            "index": 1,
            "start": 1,
            "a": 1,
            "b": 2,
            "frame": 0,
        }
        for route in (route for route in ROUTES if route.method == "GET"):
            last = {each.name: each.schema["enum"][0] for each in route.parameters if "enum" in each.schema}
            path = route.path.format_map(digest | last)
            with contextlib.closing(http.client.HTTPConnection(urlsplit(found.url).netloc, timeout=20)) as connection:
                for method in ("HEAD", "GET", "HEAD"):  # nothing may be left on the connection
                    connection.request(method, path, headers={"Accept-Encoding": "gzip"})
                    reply = connection.getresponse()
                    body = reply.read()
                    assert reply.status in (200, 307, 404), path
                    assert not body or method == "GET"


@pytest.mark.skipif(not all((ORT / f"{name}.gz").is_file() for name in RUNTIME), reason="needs `make browser`")
def test_the_runtime_for_browsers_is_sent_packed(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--http", "127.0.0.1:0", "--share-models")
    with serving(*words, log=log) as (_, process):
        found = site(log, process)
        assert json.loads(found.ask("/v1/models/smoke").body)["in_browser"]
        for name, kind in RUNTIME.items():
            given = found.ask(f"/page/ort/{name}", Accept_Encoding="br, gzip")
            assert (given.status, given.headers["Content-Type"], given.headers["Vary"]) == (
                200,
                kind,
                "Accept-Encoding",
            )
            assert gzip.decompress(given.body)
            assert (
                found.ask(f"/page/ort/{name}", If_None_Match=given.headers["ETag"], Accept_Encoding="gzip").status
                == 304
            )
        for taken in ({}, {"Accept_Encoding": "gzip;q=0"}, {"Accept_Encoding": "br"}):
            assert (
                "send `Accept-Encoding: gzip`" in found.ask("/page/ort/ort.wasm.min.mjs", **taken).problem()["detail"]
            )


def test_names_that_pages_give_to_this_machine_are_not_ours(
    http_site: Site, smoke_bundle: Path, tmp_path: Path
) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:80", "", "[::1", "[cats]:80"):
        refused = http_site.ask("/v1/models", Host=host)
        assert (refused.status, "Host should be localhost" in refused.problem()["detail"]) == (403, True)
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "faces.localhost"):
        assert http_site.ask("/v1/models", Host=host).status == 200
    simple = http_site.ask(
        "/v1/models/smoke/samples", "POST", {"seed": 1, "start": 0, "count": 1}, Content_Type="text/plain"
    )
    assert "Content-Type: application/json" in simple.problem()["detail"]
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--http", "127.0.0.1:0", "--insecure")
    with serving(*words, log=log) as (_, process):
        assert site(log, process).ask("/v1/models", Host="faces.example").status == 200


def test_options_of_pictures_by_url_need_them() -> None:
    for option in ("--share-models", "--open"):
        assert_clear_error(command("serve-vae", option), option, "pass --http HOST:PORT", code=2)


def test_the_gallery_opens_in_a_browser(smoke_bundle: Path, tmp_path: Path) -> None:
    browser, log, opened = tmp_path / "browser", tmp_path / "log", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part\nmv {opened}.part {opened}\n')
    browser.chmod(0o755)
    words = ("--model", smoke_bundle, "--device", "cpu", "--http", "127.0.0.1:0", "--open")
    with serving(*words, log=log, BROWSER=f"{browser} %s") as (_, process):
        until(opened.exists)
        assert opened.read_text().strip() == site(log, process).url
