"""Around every call: who calls, an id for the log, an allowance, an end with one meaning, and a measurement."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from serve.server.refusal import Code, Refusal, invalid
from serve.server.security import ANYBODY, CALLER, Caller, Tokens
from serve.server.telemetry import REQUEST_ID, Span, Telemetry, no_span
from serve.server.wire import serialiser

ID = re.compile(r"[\x21-\x7e]{1,128}")
ID_KEY = "x-request-id"
HEALTH = "/grpc.health.v1.Health/"  # probes have no tokens, and a drain does not wait for watchers
REFLECTION = "/grpc.reflection."
KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}

log = logging.getLogger("serve-vae")


class Gate(grpc.aio.ServerInterceptor):
    """The interceptor.

    Args:
        telemetry: Told of every request.
        tokens: Who may call; None: anybody.
        most: Requests at a time, of all callers together.
        log_requests: Whether each request's end is a line in the log.
        span: Opens the trace's span of a call.

    Attributes:
        stopping: Whether what comes now is turned away.
    """

    def __init__(
        self, telemetry: Telemetry, tokens: Tokens | None, most: int, log_requests: bool, span: Span = no_span
    ) -> None:
        self._telemetry = telemetry
        self._tokens = tokens
        self._most = most
        self._log_requests = log_requests
        self._span = span
        self.stopping = False
        self._accepted = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until every accepted request has ended; watchers of health and users of reflection do not count."""
        await self._idle.wait()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Put `_call` around a handler."""
        handler = await continuation(details)
        if handler is None:
            self._telemetry.requests.labels("unknown", Code.UNIMPLEMENTED.name).inc()
            return None
        kind = KINDS[handler.request_streaming, handler.response_streaming]
        behaviour, parse = getattr(handler, kind), handler.request_deserializer
        if handler.request_streaming:
            parse = None

        async def call(request: Any, context: Any) -> Any:
            reply = await self._call(details.method, metadata, lambda: _run(behaviour, parse, request, context))
            if isinstance(reply, Refusal):
                await _abort(context, reply)
            return reply

        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        changes: dict[str, Any] = {kind: call, "response_serializer": serialiser(handler.response_serializer)}
        if parse is not None:
            # A message that is none is then the caller's fault, told like any other, instead of gRPC's traceback.
            changes["request_deserializer"] = None
        return handler._replace(**changes)

    async def _call(self, method: str, metadata: dict[str, str], run: Callable[[], Awaitable[Any]]) -> Any:
        """Return the reply, or the Refusal that is sent instead; whatever it is, it is counted before it is sent."""
        counts = not method.startswith((HEALTH, REFLECTION))
        given = metadata.get(ID_KEY, "")
        identity = given if ID.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(identity)
        code, began = Code.OK, time.monotonic()
        if counts:
            self._accepted += 1
            self._idle.clear()
        self._telemetry.under_way.inc()
        try:
            caller = self._caller(method, metadata)
            CALLER.set(caller)
            if counts and self.stopping:
                text = "the server is stopping; repeat here later, or elsewhere now"
                raise Refusal(Code.UNAVAILABLE, text, 1.0)
            if counts and self._accepted > self._most:
                text = f"the server has {self._most} requests under way, the most it takes; repeat a little later"
                raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)
            with caller.request(), self._span(method, metadata):
                return await run()
        except Refusal as refusal:
            code = refusal.code
            # Its traceback holds frames, and they the model, which may be replaced: a refusal is long remembered.
            return refusal.with_traceback(None)
        except asyncio.CancelledError:
            code = Code.CANCELLED
            raise
        except grpc.aio.InternalError:  # the connection broke under a reply: nobody is there to be told
            code = Code.CANCELLED
            raise asyncio.CancelledError from None
        except Exception as error:  # a bug, or a device that failed: the log has it, the caller its id
            if isinstance(error, grpc.aio.AbortError):
                raise
            code = Code.INTERNAL
            log.exception("request %s to %s failed", identity, method)
            text = f"the server failed; its log says why under the request {identity}"
            return Refusal(code, text)
        finally:
            seconds = time.monotonic() - began
            self._telemetry.under_way.dec()
            self._telemetry.requests.labels(method, code.name).inc()
            self._telemetry.seconds.labels(method).observe(seconds)
            if counts:
                self._accepted -= 1
                if not self._accepted:
                    self._idle.set()
                if self._log_requests:
                    who = CALLER.get().name or "anybody"
                    fields = {"method": method, "code": code.name, "seconds": round(seconds, 6), "caller": who}
                    log.info("%s %s in %.3f s for %s", method, code.name, seconds, who, extra=fields)

    def _caller(self, method: str, metadata: dict[str, str]) -> Caller:
        if self._tokens is None or method.startswith(HEALTH):
            return ANYBODY
        caller = self._tokens.find(metadata.get("authorization", ""))
        if caller is None:
            text = "a token that this server knows is needed; send the metadata `authorization: Bearer TOKEN`"
            raise Refusal(Code.UNAUTHENTICATED, text)
        return caller


async def _run(behaviour: Any, parse: Any, request: Any, context: Any) -> Any:
    if parse is not None:
        try:
            request = parse(request)
        except DecodeError:
            raise invalid("the message is not what this call takes; make the client from this server's proto") from None
    result = behaviour(request, context)
    if not inspect.isasyncgen(result):
        return await result
    async for reply in result:
        await context.write(reply)
    return None


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    metadata = [*refusal.metadata(), (ID_KEY, REQUEST_ID.get())]
    await context.abort(refusal.code, refusal.message, tuple(metadata))
    raise AssertionError("abort always raises")
