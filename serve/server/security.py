"""Who may call, how much, and how the connection is encrypted.

Tokens are listed by their SHA-256 alone, so the file gives none away; they are 256 random bits, which no dictionary
holds. Certificates and the file are read again when they change.

    [tokens.alice]
    sha256 = "5e88..."
    requests = 8               # at a time; absent: any number
    samples_per_second = 1000  # absent: any number
    admin = true               # may load and unload models; absent: not
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from serve.errors import SettingsError
from serve.server.refusal import Code, Refusal
from serve.server.settings import Settings

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
KEYS = {"sha256", "requests", "samples_per_second", "admin"}
MOST_HELD = 10  # seconds of an allowance that its streams may hold; one stream may hold more

log = logging.getLogger("serve-vae")


@dataclass
class Caller:
    """Somebody with a token, and what they have used of their allowance.

    Attributes:
        name: As the file has it; empty where no tokens are asked for.
        requests: The most at a time.
        samples_per_second: The most on average; a second's worth may come at once.
        admin: Whether models may be loaded and unloaded.
    """

    name: str = ""
    requests: float = math.inf
    samples_per_second: float = math.inf
    admin: bool = False
    _under_way: int = field(default=0, compare=False)
    _balance: float = field(default=0.0, compare=False)
    _held: int = field(default=0, compare=False)
    _at: float = field(default=-math.inf, compare=False)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            Refusal: as many as allowed are under way.
        """
        if self._under_way >= self.requests:
            text = f"the token {self.name} may have {self.requests:.0f} requests at a time; wait for one to end"
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    @contextmanager
    def spending(self, samples: int) -> Iterator[None]:
        """Take samples off the allowance, for a block that makes them; they are given back where it is refused.

        Raises:
            Refusal: there are not so many yet; when there are.
        """
        missing = min(samples, self.samples_per_second) - self._earned()
        if missing > 0:
            text = (
                f"the token {self.name} may have {self.samples_per_second:.0f} samples a second; repeat a little later"
            )
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, missing / self.samples_per_second)
        self._balance -= samples
        try:
            yield
        except Refusal:
            self._balance += samples
            raise

    @contextmanager
    def holding(self, samples: int) -> Iterator[None]:
        """Hold samples of a stream while the block lasts, which may wait for its allowance.

        Raises:
            Refusal: its streams hold as many as the allowance has in a while: others need the room.
        """
        if self._held and self._held + samples > MOST_HELD * self.samples_per_second:
            text = (
                f"the token {self.name} may have {self.samples_per_second:.0f} samples a second, and its streams hold "
                f"{self._held}; wait for one to end"
            )
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)
        self._held += samples
        try:
            yield
        finally:
            self._held -= samples

    async def pace(self, samples: int) -> None:
        """Take samples off the allowance, waiting until there are so many."""
        self._earned()
        self._balance -= samples
        if self._balance < 0:
            await asyncio.sleep(-self._balance / self.samples_per_second)

    def _earned(self) -> float:
        now = time.monotonic()
        if math.isinf(self.samples_per_second):
            self._balance = math.inf
        else:
            earned = (now - self._at) * self.samples_per_second
            self._balance = min(self._balance + earned, self.samples_per_second)
        self._at = now
        return self._balance


ANYBODY = Caller(admin=True)
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


class Watched:
    """A value made from files, made again when they change.

    Args:
        paths: The files.
        read: Reads them.

    Raises:
        SettingsError: at first only; later the last good value stays, and the log says so.
    """

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], Any]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._look()
        self._value = read()

    def __call__(self) -> Any:
        """Return the value."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read()
                log.info("read %s again", " and ".join(path.name for path in self._paths))
            except SettingsError as error:
                log.error("kept what was there before: %s", error)
        return self._value

    def _look(self) -> list[tuple[int, int, int] | None]:
        stamps: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                stat = path.stat()
                stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None


class Tokens:
    """A file of tokens.

    Raises:
        SettingsError: what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[bytes, Caller] = {}
        self._file = Watched((path,), self._parse)

    def find(self, header: str) -> Caller | None:
        """Return who sends an `authorization` header, or None."""
        known: dict[bytes, Caller] = self._file()
        scheme, _, token = header.partition(" ")
        digest = hashlib.sha256(token.strip().encode(errors="surrogateescape")).digest()
        found = None
        for each, caller in known.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(each, digest) and scheme.lower() == "bearer":
                found = caller
        return found

    def _parse(self) -> dict[bytes, Caller]:
        content = _content(self._path)
        try:
            tables = tomllib.loads(content.decode())["tokens"]
            known = {}
            for name, table in tables.items():
                if unknown := set(table) - KEYS:
                    raise ValueError(f"{name}: the keys are {', '.join(sorted(KEYS))}. Received: {min(unknown)[:80]!r}")
                caller = Caller(name, **{key: value for key, value in table.items() if key != "sha256"})
                if not (caller.requests > 0 and caller.samples_per_second > 0 and isinstance(caller.admin, bool)):
                    raise ValueError(f"{name}: requests and samples_per_second are above 0, admin is true or false")
                digest = bytes.fromhex(table["sha256"])
                if len(digest) != hashlib.sha256().digest_size:
                    raise ValueError(f"{name}: sha256 has 64 hexadecimal digits")
                # Who was there before keeps what was used of the allowance.
                before = self._known.get(digest)
                known[digest] = before if before == caller else caller
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SettingsError(f"{self._path} is no file of tokens (--new-token makes one): {error}") from None
        self._known = known
        return known


def new_token(path: Path, name: str) -> str:
    """Make a token, add its hash to a file, and return it. It cannot be recovered from the file.

    Raises:
        SettingsError: the name is taken or cannot be one, or the file cannot be written.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(f"a token's name has up to 64 letters, digits, '-' and '_'. Received: {name!r}")
    try:
        before = path.read_text() if path.exists() else ""
        if before:
            Tokens(path)
            if name in tomllib.loads(before)["tokens"]:
                raise SettingsError(f"{path} has a token {name} already; choose another name, or take it out")
        token = secrets.token_urlsafe(32)
        digest = hashlib.sha256(token.encode()).hexdigest()
        path.touch(mode=0o600)
        with path.open("a") as file:
            file.write(f'{chr(10) if before else ""}[tokens.{name}]\nsha256 = "{digest}"\n')
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from None
    return token


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return gRPC's credentials for TLS, whose files are read again when they change; None without TLS.

    Raises:
        SettingsError: a file that cannot be read, or is no certificate.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca

    def read() -> Any:
        pair, authority = (_content(key), _content(cert)), _content(ca) if ca else None
        # gRPC would refuse every handshake instead, and say nothing.
        _context(settings)
        return grpc.ssl_server_certificate_configuration([pair], authority)

    files = Watched((cert, key, *([ca] if ca else [])), read)
    first = last = files()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Tell gRPC, at each handshake, of another certificate, or None."""
        nonlocal last
        before, last = last, files()
        return None if last is before else last

    # The stubs do not know that None means "as before".
    return grpc.dynamic_ssl_server_credentials(first, changed, ca is not None)  # type: ignore[arg-type]


def tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the context for HTTP's TLS, whose files are read again when they change; None without TLS.

    Raises:
        SettingsError: a file that cannot be read, or is no certificate.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    paths = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    files = Watched(tuple(path for path in paths if path), partial(_context, settings))

    def look(connection: ssl.SSLObject, name: str | None, before: ssl.SSLContext) -> None:
        """Take what the files hold at each handshake, also of those that name no host."""
        connection.context = files()

    context: ssl.SSLContext = _context(settings)
    context.sni_callback = look
    return context


def _context(settings: Settings) -> ssl.SSLContext:
    """Return a context with the settings' certificates.

    Raises:
        SettingsError: a file that cannot be read, or is no certificate.
    """
    cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    assert cert is not None
    for path in (cert, key, ca):
        if path:
            _content(path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"{cert} and {key} are no certificate and its key (PEM): {error}") from None
    if ca:
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError):
            raise SettingsError(f"{ca} holds no certificate (PEM) of an authority to trust") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
