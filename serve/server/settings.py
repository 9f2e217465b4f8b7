"""The whole configuration of a server, checked before anything is opened."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.errors import SettingsError

LISTEN = "127.0.0.1:8470"


@dataclass(frozen=True)
class Settings:
    """What `serve-vae --help` describes, flag by flag.

    Raises:
        SettingsError: flags that contradict each other.
    """

    listen: str = LISTEN
    http: str = ""  # another address
    share_models: bool = False
    open: bool = False
    # Models
    model: tuple[Path, ...] = ()
    models: Path | None = None  # a folder
    watch: float = 0.0  # seconds; 0: never
    admin: bool = False
    # Devices and batches
    device: tuple[str, ...] = ("auto",)
    arithmetic: Literal["exact", "fast"] = "exact"
    threads: int = 0
    max_batch: int = 0
    max_delay: float = 0.001  # seconds
    cuda_graphs: bool = False
    cache: Path | None = None
    # Limits
    queue_samples: int = 16384
    queue_bytes: int = 256 << 20
    max_requests: int = 2048
    message_bytes: int = 4 << 20
    streams: int = 1024  # a connection
    stall: float = 10.0  # seconds
    keepalive: float = 60.0  # seconds
    connection_idle: float = 600.0
    connection_age: float = 0.0  # 0: any
    grace: float = 30.0
    # Security
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    # Observability
    metrics: str = ""
    metrics_insecure: bool = False
    log_format: str = "text"
    log_requests: bool = False
    otel: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together; pass both, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise SettingsError("--tls-client-ca asks clients for certificates, which needs --tls-cert and --tls-key")
        for address in (self.listen, self.http):
            if not address or is_loopback(address) or self.tls_cert or self.tokens or self.insecure:
                continue
            raise SettingsError(
                f"{address} can be reached from other machines; pass --tls-cert and --tls-key, or --tokens, "
                "or --insecure if everybody is meant"
            )
        if self.metrics and not is_loopback(self.metrics) and not (self.insecure or self.metrics_insecure):
            raise SettingsError(
                f"--metrics {self.metrics} can be reached from other machines, and has neither TLS nor tokens; choose "
                "an address of the loopback, or pass --metrics-insecure if everybody may read it"
            )
        for name in ("share_models", "open"):
            if getattr(self, name) and not self.http:
                raise SettingsError(f"--{name.replace('_', '-')} is about pictures by URL; pass --http HOST:PORT")
        if self.watch and not self.models:
            raise SettingsError("--watch looks after a folder of models; pass --models FOLDER")
        if self.admin and not self.models:
            raise SettingsError("--admin loads files from a folder of models; pass --models FOLDER")
        if self.admin and not self.tokens and not is_loopback(self.listen):
            raise SettingsError("--admin beyond this machine needs --tokens, one of them with admin = true")


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach an address to listen on."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
