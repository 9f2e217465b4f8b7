"""Around every call: who calls, an id for the log, an allowance, an end with one meaning, and a measurement.

A call's messages pass through here as bytes, one at a time. On the wire a call with one message is a stream of one, and
only of streams gRPC says when a message has gone; and it reads a stream's messages only when asked. So every call is
handled as a stream: nothing is read of a caller who may not call, and what a caller holds is held until it has left.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from serve.server import connections
from serve.server.refusal import Code, Refusal, invalid
from serve.server.security import ANYBODY, CALLER, Caller, Tokens
from serve.server.telemetry import REQUEST_ID, Span, Telemetry, no_span

ID = re.compile(r"[\x21-\x7e]{1,128}")
ID_KEY = "x-request-id"
HEALTH = "/grpc.health.v1.Health/"  # probes have no tokens, and a drain does not wait for watchers
REFLECTION = "/grpc.reflection."
WATCHERS = 128  # calls to these two at a time; they need no allowance
SLOWEST = 2**17  # bytes a second of a message, beyond the patience
PATIENCE = 10.0  # seconds for a request to arrive
MOMENT = 0.25  # seconds in which a message usually is there
ARRIVING_BYTES = 64 << 20  # of messages that take longer to arrive
STOPPING = "the server is stopping; repeat here later, or elsewhere now"
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
        telemetry: Counts every request.
        tokens: Who may call; None: anybody.
        most: Requests at a time, of all callers together.
        message_bytes: The largest message that is taken.
        stall: Seconds after which a reply that has not left counts as not being read. It stays, and what it holds,
            until another caller needs the room.
        log_requests: Whether each request's end is a line in the log.
        span: Opens the trace's span of a call.

    Attributes:
        stopping: Whether what comes now is turned away.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        tokens: Tokens | None,
        most: int,
        message_bytes: int,
        stall: float,
        log_requests: bool,
        span: Span = no_span,
    ) -> None:
        self._telemetry = telemetry
        self._tokens = tokens
        self._most = most
        self._message_bytes = message_bytes
        self._stall = stall
        self._log_requests = log_requests
        self._span = span
        self.stopping = False
        self._arriving = 0  # messages that take longer than a moment
        self._accepted = 0
        self._watching: set[asyncio.Task[Any]] = set()
        self._released = False
        self._writing: dict[Any, float] = {}  # since when a reply that has not left counts as not being read
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until every accepted request has ended; watchers of health and users of reflection do not count."""
        await self._idle.wait()

    def release(self) -> None:
        """End the calls that `idle` does not wait for."""
        self._released = True
        for task in self._watching:
            task.cancel()

    def make_room(self) -> None:
        """End the connections of those who hold what others need: readers that take nothing."""
        now = time.monotonic()
        for context, until in list(self._writing.items()):
            if until < now and connections.end(context.peer()):
                self._telemetry.stalled.inc()
                log.warning("ended the connection of %s, which reads nothing while others wait", context.peer())

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Put `_call` around a handler."""
        handler = await continuation(details)
        if handler is None:
            self._telemetry.requests.labels("unknown", Code.UNIMPLEMENTED.name).inc()
            return None
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

        async def call(_: Any, context: Any) -> None:
            refusal = await self._call(details.method, metadata, handler, context)
            if refusal:
                await _abort(context, refusal)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _call(self, method: str, metadata: dict[str, str], handler: Any, context: Any) -> Refusal | None:
        """Answer a call, or return the Refusal to send instead; either is counted before its end is sent."""
        counts = not method.startswith((HEALTH, REFLECTION))
        given = metadata.get(ID_KEY, "")
        identity = given if ID.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(identity)
        code, began, left = Code.OK, time.monotonic(), context.time_remaining()
        self._enter(counts)
        try:
            caller = self._caller(method, metadata)
            CALLER.set(caller)
            self._check_room(counts)
            with caller.request(), self._span(method, metadata):
                await self._run(handler, context)
        except Refusal as refusal:
            code = refusal.code
            # Its traceback holds frames, and they the model, which may be replaced: a refusal is long remembered.
            return refusal.with_traceback(None)
        except (asyncio.CancelledError, grpc.aio.InternalError):
            if self._released and not counts:
                code = Code.UNAVAILABLE
                return Refusal(code, STOPPING, 1.0)
            # The caller went, or its connection broke under a reply: there is nobody to answer.
            code = Code.DEADLINE_EXCEEDED if _is_late(left, time.monotonic() - began) else Code.CANCELLED
            raise asyncio.CancelledError from None
        except Exception as error:  # a bug, or a device that failed: the log has it, the caller its id
            if isinstance(error, grpc.aio.AbortError):
                raise
            code = Code.INTERNAL
            log.exception("request %s to %s failed", identity, method)
            text = f"the server failed; its log says why under the request {identity}"
            return Refusal(code, text)
        finally:
            self._leave(counts, method, code, time.monotonic() - began)
        return None

    def _enter(self, counts: bool) -> None:
        self._telemetry.under_way.inc()
        if counts:
            self._accepted += 1
            self._idle.clear()
        else:
            task = asyncio.current_task()
            assert task is not None
            self._watching.add(task)

    def _leave(self, counts: bool, method: str, code: grpc.StatusCode, seconds: float) -> None:
        self._telemetry.under_way.dec()
        self._telemetry.requests.labels(method, code.name).inc()
        self._telemetry.seconds.labels(method).observe(seconds)
        if not counts:
            task = asyncio.current_task()
            assert task is not None
            self._watching.discard(task)
            return
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

    def _check_room(self, counts: bool) -> None:
        if counts and self.stopping:
            raise Refusal(Code.UNAVAILABLE, STOPPING, 1.0)
        here, most = (self._accepted, self._most) if counts else (len(self._watching), WATCHERS)
        if here > most:
            self.make_room()
            what = "requests" if counts else "calls to health and reflection"
            text = f"the server has {most} {what} under way, the most it takes; repeat a little later"
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)

    async def _run(self, handler: Any, context: Any) -> None:
        """Read a call's message, and write what its handler returns or yields."""
        behaviour = getattr(handler, KINDS[handler.request_streaming, handler.response_streaming])
        messages = self._messages(handler.request_deserializer, context)
        if handler.request_streaming:
            request: Any = messages
        else:
            async with aclosing(messages):
                request = await anext(messages, None)
            if request is None:
                raise invalid("this call takes one message. Received: none")
        result = behaviour(request, context)
        if not inspect.isasyncgen(result):
            await self._write(handler.response_serializer, await result, context)
            return
        async with aclosing(result):
            async for reply in result:
                await self._write(handler.response_serializer, reply, context)

    async def _messages(self, parse: Callable[[bytes], Any], context: Any) -> AsyncGenerator[Any]:
        while (message := await self._read(context)) is not grpc.aio.EOF:
            try:
                parsed = parse(message)
            except DecodeError:
                text = "the message is not what this call takes; make the client from this server's proto"
                raise invalid(text) from None
            yield parsed

    async def _read(self, context: Any) -> Any:
        """Return the next message's bytes, or EOF.

        Few messages at a time may take longer than a moment: what has arrived of them is memory that nothing counts.
        """
        reading = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait((reading,), timeout=MOMENT)
            if not reading.done():
                await self._wait_long(reading)
            return reading.result()
        finally:
            reading.cancel()

    async def _wait_long(self, reading: asyncio.Future[Any]) -> None:
        if self._arriving >= max(1, ARRIVING_BYTES // self._message_bytes):
            text = "too many messages are arriving slowly; send the whole of one at once, a little later"
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)
        self._arriving += 1
        try:
            await asyncio.wait((reading,), timeout=PATIENCE + self._message_bytes / SLOWEST)
        finally:
            self._arriving -= 1
        if not reading.done():
            raise Refusal(Code.RESOURCE_EXHAUSTED, "the message did not arrive in time; send it again, faster", 1.0)

    async def _write(self, serialise: Callable[[Any], bytes], reply: Any, context: Any) -> None:
        """Send a reply, message or bytes, and return once HTTP/2's flow control has let it go."""
        data = reply if isinstance(reply, bytes) else serialise(reply)
        self._writing[context] = time.monotonic() + self._stall + len(data) / SLOWEST
        try:
            await context.write(data)
        finally:
            del self._writing[context]


def _is_late(left: float | None, seconds: float) -> bool:
    """Tell whether a call that ended after so many seconds ended at its deadline, which was so many seconds away.

    Deadlines travel as what is left of them: a client's own clock runs out a little before the server's.
    """
    return left is not None and seconds >= 0.95 * left - 0.05


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    metadata = [*refusal.metadata(), (ID_KEY, REQUEST_ID.get())]
    await context.abort(refusal.code, refusal.message, tuple(metadata))
    raise AssertionError("abort always raises")
