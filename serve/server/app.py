"""The server put together: opened, warmed up, ready, drained."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.bundle import DEFAULT, Bundle
from serve.errors import ServeError, SettingsError
from serve.server import admin, health, inference, sampling
from serve.server.folder import Loader, engines
from serve.server.gate import Gate
from serve.server.models import Registry
from serve.server.security import Tokens, credentials
from serve.server.settings import Settings
from serve.server.telemetry import Telemetry, no_span, tracing
from serve.server.work import Backend, Budget
from serve.stubs import inference_pb2_grpc
from serve.stubs.admin.v1 import admin_pb2_grpc
from serve.stubs.sampling.v1 import sampling_pb2_grpc

LINGER = 0.25  # seconds in which new calls are still answered, by saying that the server stops
HANDSHAKE_SECONDS = 20  # for TLS and HTTP/2; who takes longer is not going to send a request

log = logging.getLogger("serve-vae")


class App:
    """A server. Make it on a running event loop.

    Args:
        settings: All of its configuration.
        opened: Opens a bundle on the devices; the settings' engines by default.

    Raises:
        SettingsError: a file or an address that cannot be used.
    """

    def __init__(self, settings: Settings, opened: Callable[[Bundle], Sequence[Backend]] | None = None) -> None:
        self._settings = settings
        tokens = Tokens(settings.tokens) if settings.tokens else None
        secure = credentials(settings)
        self.telemetry = Telemetry()
        budget = Budget(settings.queue_samples, settings.queue_bytes)
        self.registry = Registry(self._tell_health)
        self.loader = Loader(settings, self.registry, budget, self.telemetry, opened or engines(settings))
        self.telemetry.collect_from(self.registry, budget)
        span = tracing() if settings.otel else no_span
        self.gate = Gate(
            self.telemetry,
            tokens,
            settings.max_requests,
            settings.message_bytes,
            settings.stall,
            settings.log_requests,
            span,
        )
        budget.make_room = self.gate.make_room
        self._stopping = False
        services = (sampling.SERVICE, inference.SERVICE, *([admin.SERVICE] if settings.admin else []))
        self.health = health.HealthService(services)
        self._server = grpc.aio.server(interceptors=[self.gate], options=_options(settings))
        encoders = sampling.Encoders(self.telemetry)
        sampling_pb2_grpc.add_SamplingServiceServicer_to_server(
            sampling.SamplingService(self.registry, encoders), self._server
        )
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            inference.InferenceService(self.registry, settings.max_delay), self._server
        )
        if settings.admin:
            admin_pb2_grpc.add_AdminServiceServicer_to_server(
                admin.AdminService(self.registry, self.loader), self._server
            )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        reflection.enable_server_reflection((*services, health.SERVICE, reflection.SERVICE_NAME), self._server)
        self.address = _listen(self._server, settings.listen, secure)
        if settings.metrics:
            self.telemetry.listen(settings.metrics)

    async def start(self) -> None:
        """Answer calls, load the models, and only then be ready.

        Raises:
            ServeError: a model that was named cannot be served, or the folder has none that can and is not watched.
        """
        await self._server.start()
        try:
            await load_models(self._settings, self.loader, self.registry)
        except ServeError:
            await self._server.stop(None)
            raise
        log.info("ready, listening on %s", self.address)

    async def stop(self, grace: float) -> None:
        """Say that nothing more is taken, finish what was accepted within so many seconds, and end the rest."""
        self._stopping = True
        self._tell_health()
        # Calls that are on their way get a reason; gRPC would cut them off without one.
        self.gate.stopping = True
        if grace:
            await asyncio.sleep(LINGER)
        # It ends once the last connection has: so, once every reply has left, however slowly it is read.
        stopped = asyncio.ensure_future(self._server.stop(grace))
        idle = asyncio.ensure_future(self.gate.idle())
        await asyncio.wait((stopped, idle), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        self.gate.release()  # who watches health would stay until the grace is over
        await stopped
        # A thread that still computes while the interpreter ends would abort the process.
        await self.registry.close()

    async def cut(self) -> None:
        """End every call now."""
        await self._server.stop(None)

    def _tell_health(self) -> None:
        self.health.set(self.registry.working and not self._stopping)


async def load_models(settings: Settings, loader: Loader, registry: Registry) -> None:
    """Load what the settings name.

    Raises:
        ServeError: a model that was named cannot be served, or the folder has none that can and is not watched.
    """
    if settings.models:
        if not settings.models.is_dir():
            raise SettingsError(f"--models {settings.models} is no folder")
        await loader.scan(settle=False)
    for path in dict.fromkeys(settings.model or (() if settings.models else (DEFAULT,))):
        await loader.load(Path(path))
    if not len(registry) and not (settings.watch or settings.admin):
        raise SettingsError(f"{settings.models} has no model that can be served; export one there, or pass --watch")


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted; a second signal ends it now.

    Raises:
        ServeError: the server cannot be started like this.
    """
    signals, loop = asyncio.Queue[int](), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    app = App(settings)
    signalled = asyncio.ensure_future(signals.get())
    started = asyncio.ensure_future(app.start())
    await asyncio.wait((started, signalled), return_when=asyncio.FIRST_COMPLETED)
    if started.done():
        started.result()
        watching = asyncio.ensure_future(app.loader.watch(settings.watch)) if settings.watch else None
        await signalled
        if watching:
            watching.cancel()
    else:
        started.cancel()
    log.info("stopping: no new requests; what was accepted has %.0f s", settings.grace)
    stopping = asyncio.ensure_future(app.stop(settings.grace))
    again = asyncio.ensure_future(signals.get())
    await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.warning("stopping now: a second signal")
        await asyncio.wait((asyncio.ensure_future(app.cut()),), timeout=LINGER)
        _leave()
    stopping.result()
    if app.loader.busy:
        log.info("left a model that was still being loaded")
        _leave()


def _leave() -> NoReturn:
    """End the process, also where a thread is busy: the interpreter would wait for it, or abort under it."""
    logging.shutdown()
    os._exit(0)


async def check(settings: Settings) -> list[str]:
    """Do all that a start does, but listen; return a line for each model.

    Raises:
        ServeError: what would keep the server from starting.
    """
    telemetry, registry = Telemetry(), Registry()
    if settings.tokens:
        Tokens(settings.tokens)
    credentials(settings)
    if settings.otel:
        tracing()
    loader = Loader(
        settings, registry, Budget(settings.queue_samples, settings.queue_bytes), telemetry, engines(settings)
    )
    await load_models(settings, loader, registry)
    lines = [
        f"{model.name} version {model.version}: {model.card.precision}, sha256 {model.digest}{model.on_card}"
        for model in registry.models()
    ]
    await registry.close()
    return lines


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Return gRPC's channel arguments."""
    options = {
        # A second server on the port is then an error instead of a thief of requests.
        "grpc.so_reuseport": 0,
        "grpc.max_receive_message_length": settings.message_bytes,
        "grpc.max_concurrent_streams": settings.streams,
        "grpc.keepalive_time_ms": int(settings.keepalive * 1000),
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.server_handshake_timeout_ms": HANDSHAKE_SECONDS * 1000,
        "grpc.max_connection_idle_ms": int(settings.connection_idle * 1000),
    }
    if settings.connection_age:
        options["grpc.max_connection_age_ms"] = int(settings.connection_age * 1000)
        options["grpc.max_connection_age_grace_ms"] = int(settings.grace * 1000)
    return list(options.items())


def _listen(server: grpc.aio.Server, address: str, secure: grpc.ServerCredentials | None) -> str:
    """Listen on every address that a host name has here; gRPC is content with one, and another server has the rest.

    Raises:
        SettingsError: one of them is in use, or there is none.
    """
    if address.startswith("unix:"):
        _check_unused(address)
        _bind(server, address, secure, address)
        return address
    host, _, port = address.rpartition(":")
    bound = int(port)
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        places = {(family, place[0]) for family, _, _, _, place in found if _is_here(family, place)}
    except OSError:
        places = set()
    if not places:
        raise SettingsError(f"cannot listen on {address}: {host} is not this machine's; choose another")
    for family, place in sorted(places):
        text = f"[{place}]" if family == socket.AF_INET6 else place
        bound = _bind(server, f"{text}:{bound}", secure, address)
    return f"{host}:{bound}"


def _is_here(family: int, place: tuple[Any, ...]) -> bool:
    """Tell whether an address can be listened on; names such as localhost may have one of a protocol that is off."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((place[0], 0, *place[2:]))
        except OSError:
            return False
    return True


def _check_unused(address: str) -> None:
    """Raise SettingsError where a server listens on a unix socket; gRPC would take the name from it without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address.removeprefix("unix:").removeprefix("//"))
        except OSError:  # nobody is there: at most what a server left that was killed
            return
    raise SettingsError(f"cannot listen on {address}: it is in use; choose another")


def _bind(server: grpc.aio.Server, place: str, secure: grpc.ServerCredentials | None, address: str) -> int:
    try:
        return server.add_secure_port(place, secure) if secure else server.add_insecure_port(place)
    except RuntimeError:
        raise SettingsError(f"cannot listen on {address}: it is in use, or not allowed; choose another") from None
