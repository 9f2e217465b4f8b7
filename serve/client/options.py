"""How to reach a server."""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serve.errors import Rejected, RemoteError

# What may stand for several addresses: all of them are used that say they serve.
NAMES = ("dns:", "ipv4:", "ipv6:")
SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}})


@dataclass(frozen=True)
class Options:
    """How to reach a server, and how patiently.

    Raises:
        Rejected: no header can hold the token.

    Attributes:
        token: A bearer token.
        tls: Whether the server has TLS; so it is where one of the files below is given.
        ca: PEM of the authorities to trust; None: the system's.
        cert: PEM of the client's own certificate chain, for mutual TLS; it goes with `key`.
        key: PEM of its key.
        server_name: The name on the server's certificate, where it is not the address's.
        timeout: Seconds that one call may take; a stream may take any time.
        patience: Seconds to go on asking a server that answered once and now is full, away, broken, or still loads
            its models. 0: never.
        start: Seconds to go on asking where nobody listens yet, since a server may be starting there. 0: never.
    """

    token: str = ""
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""
    timeout: float = 60.0
    patience: float = 60.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if not all("!" <= each <= "~" for each in self.token):  # which gRPC would tell of in words of its own
            raise Rejected("a token is letters, digits and signs of ASCII, without blanks and ends of lines")

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return bool(self.tls or self.ca or self.cert or self.key)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The metadata of each call."""
        return [("authorization", f"Bearer {self.token}")] if self.token else []

    def channel_options(self, address: str) -> list[tuple[str, Any]]:
        """Return the arguments of gRPC's channel to an address."""
        options: list[tuple[str, Any]] = [
            # Each client has a connection of its own; gRPC would give all of a process the same one.
            ("grpc.use_local_subchannel_pool", 1),
            # A server that went without a word is noticed,
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # and one that comes back is found.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
        ]
        if address.startswith(NAMES):
            options.append(("grpc.service_config", SERVICE_CONFIG))
        return [*options, ("grpc.ssl_target_name_override", self.server_name)] if self.server_name else options

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return what TLS needs; None without it.

        Raises:
            RemoteError: a certificate without its key or the other way round; a file that cannot be used.
        """
        if not self.secure:
            return None
        if (self.cert is None) != (self.key is None):
            have = f"the key {self.key}" if self.key else f"the certificate {self.cert}"
            raise RemoteError(f"a client's certificate and its key go together. Received: {have} alone; give both")
        roots = _system_roots() if self.ca is None else _read(self.ca)
        key, cert = (None if path is None else _read(path) for path in (self.key, self.cert))
        # gRPC would take any bytes, refuse every handshake, and say nothing but that no server answers.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except ssl.SSLError:
            raise RemoteError(f"{self.ca} holds no certificate (PEM) of an authority to trust") from None
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError:
            raise RemoteError(f"{self.cert} and {self.key} are no certificate and its key (PEM)") from None
        return grpc.ssl_channel_credentials(roots, key, cert)


def _read(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RemoteError(f"cannot read {path}: {error.strerror}") from None


def _system_roots() -> bytes | None:
    """Return PEM of the authorities that this system trusts, where OpenSSL looks for them.

    gRPC by itself trusts a list that it brings along; None leaves it at that, where the system has none.
    """
    paths = ssl.get_default_verify_paths()  # with SSL_CERT_FILE and SSL_CERT_DIR
    files = [Path(paths.cafile)] if paths.cafile else sorted(Path(paths.capath).glob("*.0")) if paths.capath else []
    return b"\n".join(_read(file) for file in files) or None
