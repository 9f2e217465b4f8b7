"""Around every call, whatever brought it: who calls, an id for the log, an allowance, an end, and a measurement.

gRPC's gate and the HTTP application hand every call to one of these, so that both have the same budgets, tokens,
metrics, log and drain.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serve.server.refusal import Code, Refusal
from serve.server.security import ANYBODY, CALLER, Caller, Tokens
from serve.server.telemetry import REQUEST_ID, Span, Telemetry, no_span

ID = re.compile(r"[\x21-\x7e]{1,128}")
ID_KEY = "x-request-id"
SLOWEST = 2**17  # bytes a second of a message, beyond the patience
WATCHERS = 1024  # calls at a time that need no allowance and may last: a client of several servers has one at each
STOPPING = "the server is stopping; repeat here later, or elsewhere now"

log = logging.getLogger("serve-vae")


class Gone(Exception):
    """The caller went, or its connection broke: there is nobody to answer."""


@dataclass(frozen=True)
class Call:
    """What is known of a call before it is read.

    Attributes:
        method: What is called; it labels metrics, so it is one of few.
        headers: What came with it, by names in lower case.
        left: Seconds until its deadline, as the caller said; None where there is none.
        watches: It needs no allowance, and no drain waits for it: health and reflection.
        open: No token is asked for.
        lasts: It watches until its caller goes.
    """

    method: str
    headers: Mapping[str, str]
    left: float | None = None
    watches: bool = False
    open: bool = False
    lasts: bool = False


class Admission:
    """The one place where calls begin and end.

    Args:
        telemetry: Counts every call.
        tokens: Who may call; None: anybody.
        most: Calls at a time, of all callers together.
        stall: Seconds after which a reply that has not left counts as not being read. It stays, and what it holds,
            until another caller needs the room.
        log_requests: Whether each call's end is a line in the log.
        span: Opens the trace's span of a call.

    Attributes:
        stopping: Whether what comes now is turned away.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        tokens: Tokens | None,
        most: int,
        stall: float,
        log_requests: bool,
        span: Span = no_span,
    ) -> None:
        self._telemetry = telemetry
        self._tokens = tokens
        self._most = most
        self._stall = stall
        self._log_requests = log_requests
        self._span = span
        self.stopping = False
        # Replies that have not left: until when they count as being read, by whom, and what ends the connection.
        self._writing: dict[object, tuple[float, str, Callable[[], bool]]] = {}
        self._accepted = 0
        self._lasting = 0
        self._watching: set[asyncio.Task[Any]] = set()
        self._released = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until every accepted call has ended; watchers do not count."""
        await self._idle.wait()

    def release(self) -> None:
        """End the calls that `idle` does not wait for."""
        self._released = True
        for task in self._watching:
            task.cancel()

    def unknown(self, identity: str = "") -> None:
        """Count a call of something that there is not, with the id that its caller gave it."""
        REQUEST_ID.set(_identity(identity))
        self._telemetry.requests.labels("unknown", Code.UNIMPLEMENTED.name).inc()

    @contextmanager
    def writing(self, size: int, peer: str, end: Callable[[], bool]) -> Iterator[None]:
        """Take note of a reply that is on its way while the block lasts.

        Args:
            size: Its bytes.
            peer: Who should read it.
            end: Ends the connection; tells whether it did.
        """
        key = object()
        self._writing[key] = time.monotonic() + self._stall + size / SLOWEST, peer, end
        try:
            yield
        finally:
            del self._writing[key]

    def make_room(self) -> None:
        """End the connections of those who hold what others need: readers that take nothing."""
        now = time.monotonic()
        ends = {peer: end for until, peer, end in self._writing.values() if until < now}
        for peer, end in ends.items():
            if end():
                self._telemetry.stalled.inc()
                log.warning("ended the connection of %s, which reads nothing while others wait", peer)
                # All that it has under way ends, a little later.
                self._writing |= {
                    key: (math.inf, who, how) for key, (_, who, how) in self._writing.items() if who == peer
                }

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """Count a call while the block lasts; its end is counted before anything is sent that tells the caller of it.

        Raises:
            Refusal: what to answer instead of what the block has: it may not begin, or the block failed.
            CancelledError: there is nobody to answer.
        """
        identity = _identity(call.headers.get(ID_KEY, ""))
        REQUEST_ID.set(identity)
        code, began = Code.OK, time.monotonic()
        self._enter(call)
        try:
            caller = self._caller(call)
            CALLER.set(caller)
            self._check_room(call)
            with caller.request(), self._span(call.method, call.headers):
                yield
        except Refusal as refusal:
            code = refusal.code
            raise
        except (asyncio.CancelledError, Gone):
            if self._released and call.watches:
                code = Code.UNAVAILABLE
                raise Refusal(code, STOPPING, 1.0) from None
            code = Code.DEADLINE_EXCEEDED if _is_late(call.left, time.monotonic() - began) else Code.CANCELLED
            raise asyncio.CancelledError from None
        except Exception:  # a bug, or a device that failed: the log has it, the caller its id
            code = Code.INTERNAL
            log.exception("request %s to %s failed", identity, call.method)
            raise Refusal(code, f"the server failed; its log says why under the request {identity}") from None
        finally:
            self._leave(call, code, time.monotonic() - began)

    def _enter(self, call: Call) -> None:
        self._telemetry.under_way.inc()
        self._lasting += call.lasts
        if call.watches:
            self._watching.add(_task())
        else:
            self._accepted += 1
            self._idle.clear()

    def _leave(self, call: Call, code: Code, seconds: float) -> None:
        self._telemetry.under_way.dec()
        self._lasting -= call.lasts
        self._telemetry.requests.labels(call.method, code.name).inc()
        self._telemetry.seconds.labels(call.method).observe(seconds)
        if call.watches:
            self._watching.discard(_task())
            return
        self._accepted -= 1
        if not self._accepted:
            self._idle.set()
        if self._log_requests:
            who = CALLER.get().name or "anybody"
            fields = {"method": call.method, "code": code.name, "seconds": round(seconds, 6), "caller": who}
            log.info("%s %s in %.3f s for %s", call.method, code.name, seconds, who, extra=fields)

    def _caller(self, call: Call) -> Caller:
        if self._tokens is None or call.open:
            return ANYBODY
        caller = self._tokens.find(call.headers.get("authorization", ""))
        if caller is None:
            text = "a token that this server knows is needed; send `authorization: Bearer TOKEN`"
            raise Refusal(Code.UNAUTHENTICATED, text)
        return caller

    def _check_room(self, call: Call) -> None:
        if self.stopping and not call.watches:
            raise Refusal(Code.UNAVAILABLE, STOPPING, 1.0)
        if call.watches and not call.lasts:  # a probe ends at once, and a server that is busy is healthy
            if len(self._watching) > 2 * WATCHERS:  # but for those who do not read its answer
                self.make_room()
            return
        here, most = (self._lasting, WATCHERS) if call.watches else (self._accepted, self._most)
        if here > most:
            self.make_room()
            what = "watchers of health and calls to reflection" if call.watches else "requests"
            text = f"the server has {most} {what} under way, the most it takes; repeat a little later"
            raise Refusal(Code.RESOURCE_EXHAUSTED, text, 1.0)


def _identity(given: str) -> str:
    """Return the id of a request: the caller's own, if it can be one."""
    return given if ID.fullmatch(given) else uuid.uuid4().hex


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _is_late(left: float | None, seconds: float) -> bool:
    """Tell whether a call that ended after so many seconds ended at its deadline, which was so many seconds away.

    Deadlines travel as what is left of them: a client's own clock runs out a little before the server's.
    """
    return left is not None and seconds >= 0.95 * left - 0.05
