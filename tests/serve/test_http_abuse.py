"""What the server has to bear by HTTP: requests that mean nothing, connections that say little, clients that die."""

from __future__ import annotations

import asyncio
import random
import re
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import Engine, load
from serve.server import listening
from serve.server.admission import Admission
from serve.server.http import door
from serve.server.http.routes import ROUTES
from serve.server.telemetry import Telemetry
from tests.conftest import serving
from tests.serve.site import POST, Site, site
from tests.serve.test_abuse import Victim
from tests.serve.test_models import until

KNOWN = {200, 304, 307, 400, 403, 404, 405, 412, 429, 503}
GIVEN = f"{POST}Content-Length: ".encode()


class Stranger(Victim):
    """A server, and a way to its other door."""

    site: Site

    def connect(self) -> socket.socket:
        return self.site.connect()

    def is_well(self) -> None:
        assert self.site.follow("/v1/models/smoke/samples/7/100.png").status == 200
        super().is_well()


@pytest.fixture(scope="module")
def victim(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    log = tmp_path_factory.mktemp("stranger") / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--metrics", "127.0.0.1:0", "--http", "127.0.0.1:0")
    with serving(*words, log=log) as (address, process):
        found = Stranger(address, process.pid, log, Engine(load(smoke_bundle), "cpu"))
        found.site = site(log, process)
        yield found
        found.is_well()


words = st.sampled_from(
    ["v1", "models", "digests", "smoke", "samples", "grid", "between", "7", "100.png", "page", "ort"]
)
parts = words | st.text(max_size=12).map(lambda text: quote(text, safe="")) | st.sampled_from(["..", ".", "%00", ""])
paths = st.lists(parts, max_size=8).map("/".join)
queries = st.lists(st.tuples(st.sampled_from(["temperature", "steps", "rows"]) | parts, parts), max_size=3).map(
    lambda pairs: "&".join(f"{key}={value}" for key, value in pairs)
)


@given(path=paths, query=queries, method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE"]))
@settings(max_examples=300, deadline=None)
def test_addresses_of_any_kind(victim: Stranger, path: str, query: str, method: str) -> None:
    assert victim.site.ask(f"/{path}?{query}", method).status in KNOWN


@given(
    body=st.binary(max_size=200) | st.text(max_size=50).map(str.encode), kind=st.sampled_from(["", "gzip", "chunked"])
)
@settings(max_examples=100, deadline=None)
def test_bodies_of_any_bytes(victim: Stranger, body: bytes, kind: str) -> None:
    with victim.connect() as connection:
        more = f"Content-Encoding: {kind}\r\n".encode() if kind else b""
        connection.sendall(GIVEN + f"{len(body)}\r\n".encode() + more + b"\r\n" + body)
        assert re.match(rb"HTTP/1.[01] 4\d\d ", connection.recv(100))


def test_random_bytes_on_the_port(victim: Stranger) -> None:
    before, chance = victim.files(), random.Random(0)
    for turn in range(300):
        with victim.connect() as connection:
            begin = b"GET / HTTP/1.1\r\n" if turn % 2 else b""
            connection.sendall(begin + chance.randbytes(chance.randrange(2000)))
            if turn % 3 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no goodbye
    victim.is_well()
    until(lambda: victim.files() <= before + 2)


def test_a_thousand_connections_that_say_nothing_or_little(victim: Stranger) -> None:
    before_files, before_memory = victim.files(), victim.resident()
    begins = (b"", b"GET /v1/mod", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", GIVEN + b"4000\r\n\r\n{")
    silent = []
    for turn in range(1000):
        connection = victim.connect()
        connection.sendall(begins[turn % len(begins)])
        silent.append(connection)
    victim.is_well()
    for _ in range(5):
        for connection in silent[:100]:
            with suppress(OSError):  # the server may have had enough of it
                connection.send(b"P")
        assert victim.site.ask("/healthz").status == 200
    for connection in silent:
        connection.close()
    until(lambda: victim.files() <= before_files + 2)
    assert victim.resident() - before_memory < 100 * 2**20


def test_more_connections_than_there_may_be_leave_room_for_grpc(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = ("--model", smoke_bundle, "--device", "cpu", "--metrics", "127.0.0.1:0", "--http", "127.0.0.1:0")
    with serving(*given, "--max-requests", 50, log=log) as (address, process):
        victim = Stranger(address, process.pid, log, Engine(load(smoke_bundle), "cpu"))
        victim.site = site(log, process)
        silent = [victim.connect() for _ in range(60)]
        until(lambda: len(select.select(silent, [], [], 0)[0]) >= 10)  # there is nothing to read but an end
        Victim.is_well(victim)  # who is there is bounded, and the other door has its own room
        victim.is_well()  # and who has something to ask takes the place of who has not
        for connection in silent:
            connection.close()


def test_a_client_that_is_killed_leaves_nothing_behind(victim: Stranger) -> None:
    code = f"""
import urllib.request
body = b'{{"seed": 1, "start": 0, "count": 1000000000}}'
asked = urllib.request.Request({victim.site.url + "/v1/models/smoke/samples"!r}, body)
asked.add_header("Content-Type", "application/json")
reply = urllib.request.urlopen(asked)
reply.read(1000)
print("reading", flush=True)
while reply.read(1000):
    pass
"""
    victim.outlives(code)


def test_many_requests_given_up_at_any_time(victim: Stranger) -> None:
    digest = victim.site.ask("/v1/models/smoke/samples/1/1.png").headers["Location"].split("/")[3]
    chance = random.Random(1)
    asked = [
        f"GET /v1/digests/{digest}/grid/{seed}/0.webp?columns=16&rows=16 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        for seed in range(64)
    ]

    def one(requests: list[str]) -> None:
        for request in requests:
            with victim.connect() as connection:
                connection.sendall(request.encode())
                connection.settimeout(chance.random() / 10 + 1e-3)
                with suppress(TimeoutError):
                    connection.recv(chance.randrange(1, 10_000))

    threads = [threading.Thread(target=one, args=(asked[at::8],)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    victim.is_well()


def test_who_does_not_come_to_a_request_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often there is another byte of it."""
    monkeypatch.setattr(door, "FIRST", 0.5)

    async def ended() -> int:
        address, sockets = listening.sockets("127.0.0.1:0")
        admission = Admission(Telemetry(), None, 10, 10.0, log_requests=False)
        handlers = dict.fromkeys((route.handler for route in ROUTES), never)
        patient = door.Door(handlers, admission, 10, 60.0, "", sockets, None, local=True)
        await patient.start()
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        sent = 0
        while not reader.at_eof():
            writer.write(b"GET / HTTP/1.1\r\n"[sent : sent + 1] or b"X-A: b\r\n")
            sent += 1
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.05):
                    await reader.read(1)
        writer.close()
        await patient.stop()
        return sent

    async def bounded() -> int:
        async with asyncio.timeout(30):
            return await ended()

    assert asyncio.run(bounded()) > 2


async def never(asked: object, send: object) -> NoReturn:
    pytest.fail("nothing was asked")
