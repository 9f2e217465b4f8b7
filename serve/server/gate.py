"""gRPC's door: calls are admitted, read and answered as streams.

A call's messages pass through here as bytes, one at a time. On the wire a call with one message is a stream of one, and
only of streams gRPC says when a message has gone; and it reads a stream's messages only when asked. So every call is
handled as a stream: nothing is read of a caller who may not call, and what a caller holds is held until it has left.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from serve.server import connections
from serve.server.admission import ID_KEY, SLOWEST, Admission, Call, Gone
from serve.server.refusal import Code, Refusal, invalid
from serve.server.telemetry import REQUEST_ID

HEALTH = "/grpc.health.v1.Health/"  # probes have no tokens, and a drain does not wait for watchers
REFLECTION = "/grpc.reflection."
PATIENCE = 10.0  # seconds for a request to arrive
MOMENT = 0.25  # seconds in which a message usually is there
ARRIVING_BYTES = 64 << 20  # of messages that take longer to arrive
KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class Gate(grpc.aio.ServerInterceptor):
    """The interceptor.

    Args:
        admission: What every call passes through.
        message_bytes: The largest message that is taken.
    """

    def __init__(self, admission: Admission, message_bytes: int) -> None:
        self._admission = admission
        self._message_bytes = message_bytes
        self._arriving = {True: 0, False: 0}  # messages that take longer than a moment, of watchers and others

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Put an admitted call around a handler."""
        handler = await continuation(details)
        if handler is None:
            self._admission.unknown()
            return None
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        method = details.method
        watches = method.startswith((HEALTH, REFLECTION))
        lasts = watches and not method.endswith("/Check")

        async def call(_: Any, context: Any) -> None:
            open_ = method.startswith(HEALTH)
            asked = Call(method, metadata, context.time_remaining(), watches, open_, lasts)
            try:
                with self._admission.call(asked):
                    try:
                        await self._run(handler, context, watches)
                    except grpc.aio.InternalError:  # the connection broke under a message
                        raise Gone from None
                return
            except Refusal as raised:
                # Its traceback holds frames, and they the model, which may be replaced: a refusal is long remembered.
                refusal = raised.with_traceback(None)
                refusal.__context__ = None
            await _abort(context, refusal)

        return grpc.stream_stream_rpc_method_handler(call)

    async def _run(self, handler: Any, context: Any, watches: bool) -> None:
        """Read a call's message, and write what its handler returns or yields."""
        behaviour = getattr(handler, KINDS[handler.request_streaming, handler.response_streaming])
        messages = self._messages(handler.request_deserializer, context, watches)
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

    async def _messages(self, parse: Callable[[bytes], Any], context: Any, watches: bool) -> AsyncGenerator[Any]:
        while (message := await self._read(context, watches)) is not grpc.aio.EOF:
            try:
                parsed = parse(message)
            except DecodeError:
                text = "the message is not what this call takes; make the client from this server's proto"
                raise invalid(text) from None
            yield parsed

    async def _read(self, context: Any, watches: bool) -> Any:
        """Return the next message's bytes, or EOF.

        Few messages at a time may take longer than a moment: what has arrived of them is memory that nothing counts.
        """
        reading = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait((reading,), timeout=MOMENT)
            if not reading.done():
                await self._wait_long(reading, watches)
            return reading.result()
        finally:
            reading.cancel()

    async def _wait_long(self, reading: asyncio.Future[Any], watches: bool) -> None:
        # Calls that need no token have places of their own.
        if self._arriving[watches] >= max(1, ARRIVING_BYTES // self._message_bytes):
            text = "too many messages are arriving slowly; send the whole of one at once, a little later"
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)
        self._arriving[watches] += 1
        try:
            await asyncio.wait((reading,), timeout=PATIENCE + self._message_bytes / SLOWEST)
        finally:
            self._arriving[watches] -= 1
        if not reading.done():
            raise Refusal(Code.RESOURCE_EXHAUSTED, "the message did not arrive in time; send it again, faster", 1.0)

    async def _write(self, serialise: Callable[[Any], bytes], reply: Any, context: Any) -> None:
        """Send a reply, message or bytes, and return once HTTP/2's flow control has let it go."""
        data = reply if isinstance(reply, bytes) else serialise(reply)
        peer = context.peer()
        with self._admission.writing(len(data), peer, lambda: connections.end(peer)):
            await context.write(data)


async def _abort(context: Any, refusal: Refusal) -> NoReturn:
    metadata = [*refusal.metadata(), (ID_KEY, REQUEST_ID.get())]
    await context.abort(refusal.code, refusal.message, tuple(metadata))
    raise AssertionError("abort always raises")
