"""HTTP's door: connections are bounded, and every request is admitted as gRPC's calls are, and answered or refused."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, aclosing
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from serve.server.admission import ID_KEY, Admission, Call, Gone
from serve.server.http.answering import Asked, Handler, Part
from serve.server.http.pictures import MOST_BODY
from serve.server.http.routes import PROBLEM, ROUTES, Parameter, Route
from serve.server.refusal import Code, Refusal, invalid
from serve.server.telemetry import REQUEST_ID
from serve.text import quoted

FIRST = 20.0  # seconds for a new connection's first request
LINGER = 0.25  # seconds for what is cut off at the end
PIECE = 2**16  # bytes that are handed to a connection at a time
STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.FAILED_PRECONDITION: 412,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.INTERNAL: 500,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
QUIET = logging.getLogger("serve-vae.http")  # of aiohttp: noise that is no HTTP; what fails here is admission's to log
QUIET.setLevel(logging.CRITICAL)
SAFE = {"Server": "serve-vae", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Door:
    """The HTTP server. Make it on a running event loop.

    Args:
        handlers: Answer, by the names that the table of routes has for them.
        admission: What every call passes through.
        connections: The most at a time.
        idle: Seconds after which a connection without requests is closed.
        url: What it answers at.
        sockets: To listen on, bound.
        secure: TLS; None for none.
        local: Whether to answer those only who call this machine by an address or as localhost. A page of the web can
            give its own name this machine's address, and its browser would take our replies for that page's own.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        admission: Admission,
        connections: int,
        idle: float,
        url: str,
        sockets: list[socket.socket],
        secure: ssl.SSLContext | None,
        local: bool,
    ) -> None:
        self.url, self._sockets, self._local = url, sockets, local
        self._handlers, self._admission, self._most, self._secure = handlers, admission, connections, secure
        self._waiting: dict[asyncio.BaseTransport | None, asyncio.TimerHandle] = {}  # for a first request
        self._idle: dict[asyncio.BaseTransport, None] = {}  # without a request, those for longest first
        self._open = 0
        self._listening: list[asyncio.Server] = []
        app = web.Application(middlewares=[self._answer], client_max_size=MOST_BODY)
        for route in ROUTES:
            for method in (route.method, "HEAD") if route.method == "GET" else (route.method,):
                app.router.add_route(method, _pattern(route), partial(self._route, route))
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,  # who leaves is computed for no longer
            keepalive_timeout=idle,
            access_log=None,
            logger=QUIET,
            max_headers=32,  # these three bound what a connection can make us hold
            max_field_size=8192,
            read_bufsize=2**14,
            lingering_time=1.0,
            shutdown_timeout=LINGER,
        )

    async def start(self) -> None:
        """Listen."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            patience = FIRST if self._secure else None
            listening = await loop.create_server(
                self._protocol, sock=each, ssl=self._secure, ssl_handshake_timeout=patience
            )
            self._listening.append(listening)

    async def stop(self) -> None:
        """End all connections."""
        for each in self._listening:
            each.close()
        await self._runner.cleanup()

    def _protocol(self) -> asyncio.Protocol:
        """Return what reads a new connection."""
        server = self._runner.server
        assert server is not None
        return _Bounded(server(), self)

    def arrived(self, transport: asyncio.BaseTransport) -> bool:
        """Take note of a connection; tell whether there is room for it."""
        self._open += 1
        room = self._open <= self._most
        if not room:
            self._admission.make_room()
            room = self._displace()
        self._idle[transport] = None
        self._waiting[transport] = asyncio.get_running_loop().call_later(FIRST, self._late, transport)
        return room

    def _displace(self) -> bool:
        """End the connection that has had no request for longest, as it can come again; tell whether there was one."""
        while self._idle:
            longest = next(iter(self._idle))
            del self._idle[longest]
            if _cut(longest):
                return True
        return False

    def writing(self, transport: asyncio.BaseTransport) -> AbstractContextManager[None]:
        """Take note of a connection that takes no more for now."""
        peer = str(transport.get_extra_info("peername"))
        return self._admission.writing(PIECE, peer, partial(_cut, transport))

    def left(self, transport: asyncio.BaseTransport | None) -> None:
        """Take note of the end of one."""
        self._open -= 1
        self._spoke(transport)

    def _spoke(self, transport: asyncio.BaseTransport | None) -> None:
        if transport:
            self._idle.pop(transport, None)
        if handle := self._waiting.pop(transport, None):
            handle.cancel()

    def _late(self, transport: asyncio.BaseTransport) -> None:
        if self._waiting.pop(transport, None):
            _cut(transport)

    @web.middleware
    async def _answer(self, request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        """Turn whatever ends a request into a reply."""
        transport = request.transport
        self._spoke(transport)
        try:
            return await self._answered(request, handler)
        finally:
            if transport and not transport.is_closing():
                self._idle[transport] = None

    async def _answered(self, request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
        try:
            response = await handler(request)
        except Refusal as refusal:
            if request.transport is None or request.transport.is_closing():
                raise asyncio.CancelledError from None
            response = _problem(STATUS[refusal.code], refusal.code.name, refusal.message, refusal.retry_after)
        except web.HTTPException as error:  # no such path, or not by this method
            if error.status >= 500 or error.status < 400:
                raise
            self._admission.unknown(request.headers.get(ID_KEY, ""))
            text = f"{request.method} {quoted(request.path)}: {error.reason}; /openapi.json has what there is"
            code = {404: "NOT_FOUND", 405: "UNIMPLEMENTED"}.get(error.status, "INVALID_ARGUMENT")
            response = _problem(error.status, code, text)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        if not response.prepared:
            response.headers.update(_headers())
        return response

    async def _route(self, route: Route, request: web.Request) -> web.StreamResponse:
        headers = {key.lower(): value for key, value in request.headers.items()}
        # The path's pattern, not the path: a metric has a series for each.
        call = Call(f"{route.method} {route.path}", headers, watches=route.open, open=route.open)
        with self._admission.call(call):
            host = headers.get("host")  # which browsers never leave out
            if self._local and host is not None and not _is_here(host):
                expected = "localhost, or an address; a proxy has to say so too, or pass --insecure"
                raise Refusal(Code.PERMISSION_DENIED, f"the Host should be {expected}. Received: {quoted(host)}")
            asked = Asked(request, route, _values(route, request))
            return await self._handlers[route.handler](asked, partial(self._send, request))

    async def _send(
        self, request: web.Request, response: web.StreamResponse, body: AsyncGenerator[Part]
    ) -> web.StreamResponse:
        """Send a reply as the connection takes it."""
        transport = request.transport
        if transport is None:
            raise Gone
        response.headers.update(_headers())
        try:
            async with aclosing(body) as parts:
                if request.method == "HEAD":
                    await response.prepare(request)
                    return response
                part: Part | None = await anext(parts)
                await response.prepare(request)
                while part is not None:
                    view = memoryview(part).cast("B")
                    for at in range(0, len(view), PIECE):
                        await response.write(bytes(view[at : at + PIECE]))
                        await request.writer.drain()
                    part = await anext(parts, None)
                await response.write_eof()
                await request.writer.drain()
        except ConnectionError:  # of the caller's
            raise Gone from None
        except BaseException:
            if response.prepared:  # nothing can be said any more but that it is not whole
                _cut(transport)
            raise
        return response


class _Bounded(asyncio.Protocol):
    """Around a connection's own protocol: it is counted, ended where there are too many, and known to be stuck."""

    def __init__(self, inner: Any, door: Door) -> None:
        self._inner, self._door = inner, door
        self._transport: Any = None
        self._stuck = ExitStack()  # while the caller takes less than there is to send

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        # Whoever drains then waits until all has left, and what is left at the end of a drain is nothing.
        transport.set_write_buffer_limits(high=0)
        self._inner.connection_made(transport)
        if not self._door.arrived(transport):
            _cut(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._stuck.close()
        self._door.left(self._transport)
        self._inner.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        kept: bool | None = self._inner.eof_received()
        return kept

    def pause_writing(self) -> None:
        self._stuck.enter_context(self._door.writing(self._transport))
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stuck.close()
        self._inner.resume_writing()


def _headers() -> dict[str, str]:
    """Return what all replies have."""
    identity = REQUEST_ID.get()
    return {**SAFE, **({ID_KEY: identity} if identity else {})}


def _is_here(host: str) -> bool:
    """Tell whether a Host is localhost or an address, whatever the port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that belong to nothing
        return False
    try:
        return bool(ip_address(name))
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _cut(transport: Any) -> bool:
    """End a connection now; tell whether it was there."""
    there = not transport.is_closing()
    transport.abort()
    return there


def _problem(status: int, code: str, detail: str, retry_after: float | None = None) -> web.Response:
    """Return a refusal as RFC 9457 has it."""
    headers = {"Cache-Control": "no-store"}
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    problem = {"title": code.replace("_", " ").capitalize(), "status": status, "code": code, "detail": detail}
    return web.Response(status=status, text=json.dumps(problem), content_type=PROBLEM, headers=headers)


def _pattern(route: Route) -> str:
    """Return a path as the router has it, whose parts fit no more than their schemas."""

    def part(parameter: Parameter) -> str:
        schema = parameter.schema
        if "enum" in schema:
            return f"{{{parameter.name}:{'|'.join(map(re.escape, schema['enum']))}}}"
        inner = schema.get("pattern", "^[0-9]{1,20}$")
        return f"{{{parameter.name}:{inner.removeprefix('^').removesuffix('$')}}}"

    named = {each.name: part(each) for each in route.parameters}
    return re.sub(r"\{(\w+)\}", lambda found: named[found[1]], route.path)


def _values(route: Route, request: web.Request) -> dict[str, Any]:
    """Return a request's parameters.

    Raises:
        Refusal: INVALID_ARGUMENT, a value is not what it may be, or the query has what nothing takes.
    """
    known = {each.name for each in route.parameters} - route.in_path
    for key in request.query if route.listed else ():  # the page's own are its own to read
        if key not in known or len(request.query.getall(key)) > 1:
            takes = ", ".join(sorted(known)) or "nothing"
            raise invalid(f"the query takes {takes}, each once. Received: {quoted(key)}")
    values = {}
    for each in route.parameters:
        text = request.match_info.get(each.name) if each.name in route.in_path else request.query.get(each.name)
        if text is not None:
            values[each.name] = _value(each, text)
        elif each.default is not None:
            values[each.name] = each.default
    return values


def _value(parameter: Parameter, text: str) -> Any:
    schema = parameter.schema
    if schema["type"] == "string":
        if "pattern" not in schema or re.fullmatch(schema["pattern"], text):
            return text
        raise invalid(f"{parameter.name} is not what it may be. Received: {quoted(text)}")
    whole = schema["type"] == "integer"
    try:
        value = (int(text) if text.isdecimal() and len(text) <= 20 else -1) if whole else float(text)
    except ValueError:
        value = math.nan
    if schema["minimum"] <= value <= schema["maximum"]:
        return value
    kind = "a whole number" if whole else "a number"
    raise invalid(
        f"{parameter.name} must be {kind} from {schema['minimum']} to {schema['maximum']}. Received: {quoted(text)}"
    )
