"""Who may ask by HTTP, and for what, and how the server ends: the rules that gRPC has, and a browser's own."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import shutil
import signal
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from serve import Engine, load
from serve.server.http.gallery import ORT
from serve.server.http.routes import ROUTES, RUNTIME
from tests.conftest import assert_clear_error, command, serving
from tests.serve.site import FOREVER, POST, Site, site
from tests.serve.test_models import until
from tests.serve.test_readers import metric
from tests.serve.test_security import Authority, authority, token  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle), "cpu")


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
