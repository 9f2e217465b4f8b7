"""A server's HTTP side, as the tests ask it."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

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
