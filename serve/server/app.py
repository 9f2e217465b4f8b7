"""The server put together: opened, warmed up, ready, drained."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.address import loopback
from serve.bundle import DEFAULT, Bundle
from serve.errors import ServeError, SettingsError
from serve.server import admin, health, inference, listening, sampling
from serve.server.admission import Admission
from serve.server.encoders import Encoders
from serve.server.folder import Loader, engines
from serve.server.gate import Gate
from serve.server.models import Registry
from serve.server.security import Tokens, credentials, tls
from serve.server.settings import Settings, is_loopback
from serve.server.telemetry import Telemetry, no_span, tracing
from serve.server.work import Backend, Budget
from serve.stubs import inference_pb2_grpc
from serve.stubs.admin.v1 import admin_pb2_grpc
from serve.stubs.sampling.v1 import sampling_pb2_grpc

if TYPE_CHECKING:
    from serve.server.http.door import Door

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
        self.admission = Admission(
            self.telemetry, tokens, settings.max_requests, settings.stall, settings.log_requests, span
        )
        budget.make_room = self.admission.make_room
        gate = Gate(self.admission, settings.message_bytes)
        self._stopping = False
        services = (sampling.SERVICE, inference.SERVICE, *([admin.SERVICE] if settings.admin else []))
        self.health = health.HealthService(services)
        self._server = grpc.aio.server(interceptors=[gate], options=_options(settings))
        encoders = Encoders(self.telemetry)
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
        self.address = listening.bind(self._server, settings.listen, secure)
        self._http = self._door(encoders) if settings.http else None
        if settings.metrics:
            self.telemetry.listen(settings.metrics)

    @property
    def http_url(self) -> str:
        """Where pictures are; empty where there is no HTTP."""
        return self._http.url if self._http else ""

    async def start(self) -> None:
        """Answer calls, load the models, and only then be ready.

        Raises:
            ServeError: a model that was named cannot be served, or the folder has none that can and is not watched.
        """
        await self._server.start()
        if self._http:
            await self._http.start()
            log.info("pictures at %s", self._http.url)
        try:
            await load_models(self._settings, self.loader, self.registry)
        except ServeError:
            await self.cut()
            raise
        log.info("ready, listening on %s", self.address)
        if self._http and self._settings.open:
            Thread(target=_open, args=(self._http.url,), daemon=True).start()  # some browsers stay until they are left

    async def stop(self, grace: float) -> None:
        """Say that nothing more is taken, finish what was accepted within so many seconds, and end the rest."""
        until = asyncio.get_running_loop().time() + grace
        self._stopping = True
        self._tell_health()
        # Calls that are on their way get a reason; gRPC would cut them off without one.
        self.admission.stopping = True
        if grace:
            await asyncio.sleep(LINGER)
        # It ends once the last connection has: so, once every reply has left, however slowly it is read.
        stopped = asyncio.ensure_future(self._server.stop(grace))
        idle = asyncio.ensure_future(self.admission.idle())
        await asyncio.wait((stopped, idle), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        self.admission.release()  # who watches health would stay until the grace is over
        await stopped
        if self._http:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self.admission.idle()
            await self._http.stop()
        # A thread that still computes while the interpreter ends would abort the process.
        await self.registry.close()

    async def cut(self) -> None:
        """End every call now."""
        await self._server.stop(None)
        if self._http:
            await self._http.stop()

    def _door(self, encoders: Encoders) -> Door:
        """Return the door for HTTP, bound.

        Raises:
            SettingsError: what it takes is not installed, or the address cannot be listened on.
        """
        settings = self._settings
        check_http()
        from serve.server.http.door import Door
        from serve.server.http.gallery import Gallery
        from serve.server.http.pictures import Pictures

        secure = settings.tokens is not None
        gallery = Gallery(self.registry, secure, settings.share_models)
        if settings.share_models and not gallery.in_browser:
            log.warning("--share-models: browsers cannot make pictures themselves before `make browser` was run")
        grpc = {"address": self.address, "tls": settings.tls_cert is not None, "token": secure}
        pictures = Pictures(self.registry, encoders, self._is_taking, secure, gallery.in_browser, grpc)
        address, sockets = listening.sockets(settings.http)
        url = f"{'https' if settings.tls_cert else 'http'}://{address}"
        handlers = {**pictures.handlers, **gallery.handlers}
        # With tokens it does not matter who asks; elsewhere a page may have made its own name mean this machine.
        local = is_loopback(settings.http) and not (secure or settings.insecure)
        limits = settings.max_requests, settings.connection_idle
        return Door(handlers, self.admission, *limits, url, sockets, tls(settings), local)

    def _is_taking(self) -> bool:
        return self.registry.working and not self._stopping

    def _tell_health(self) -> None:
        self.health.set(self._is_taking())


async def load_models(settings: Settings, loader: Loader, registry: Registry) -> None:
    """Load what the settings name.

    Raises:
        ServeError: a model that was named cannot be served, or the folder has none that can and is not watched.
    """
    registry.loading = True
    try:
        if settings.models:
            if not settings.models.is_dir():
                raise SettingsError(f"--models {settings.models} is no folder")
            await loader.scan(settle=False)
        for path in dict.fromkeys(settings.model or (() if settings.models else (DEFAULT,))):
            await loader.load(Path(path))
    finally:
        registry.loading = False
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


def check_http() -> None:
    """Raise SettingsError where what HTTP takes is not installed."""
    if find_spec("aiohttp") is None:
        raise SettingsError("--http takes pip install '.[http]' in the checkout")


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
    if settings.http:
        check_http()
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


def _open(url: str) -> None:
    scheme, _, address = url.partition("//")
    url = f"{scheme}//{loopback(address)}"
    if not webbrowser.open(url):
        log.warning("no browser was found; open %s in one", url)
