"""What callers of a server saw, call by call, and what of it must not be."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from serve.errors import RemoteError
from serve.model import Images

Code = grpc.StatusCode
TURNED_AWAY = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "NOT_FOUND")  # what says that a call was not accepted


@dataclass(eq=False)
class Attempt:
    """One call on the wire, as its caller saw it."""

    kind: str
    identity: str
    began: float
    since: float = -math.inf  # the server was told to stop, when it began; seconds
    late: bool = False  # whether it ended after that
    replies: int = 0
    code: str = ""
    why: str = ""


class Ledger:
    """What happened, told by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.codes: Counter[tuple[str, str]] = Counter()
        self.failed: list[Attempt] = []
        self.under_way: set[Attempt] = set()
        self.events: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.told = math.inf  # when the server was told to stop
        self.over = threading.Event()

    def note(self, event: str, count: int = 1) -> None:
        """Count something that may happen."""
        with self._lock:
            self.events[event] += count

    def wrong(self, problem: str) -> None:
        """Count something that may not."""
        with self._lock:
            self.problems[problem.splitlines()[0][:200] if problem else "no reason given"] += 1

    def begin(self, kind: str) -> Attempt:
        """Take note of a call that begins."""
        attempt = Attempt(kind, uuid.uuid4().hex, time.monotonic())
        with self._lock:
            self.under_way.add(attempt)
        return attempt

    def end(self, attempt: Attempt, failure: Any = None) -> None:
        """Take note of its end, and judge what can be judged by its code."""
        attempt.code = failure.code().name if failure else "OK"
        attempt.why = f"{attempt.code}: {failure.details()}" if failure else ""
        attempt.since, attempt.late = attempt.began - self.told, time.monotonic() > self.told
        with self._lock:
            self.under_way.discard(attempt)
            self.codes[attempt.kind, attempt.code] += 1
            if failure:
                self.failed.append(attempt)
        if failure and failure.code() is Code.RESOURCE_EXHAUSTED and not 0 < retry_delay(failure) <= 30:
            self.wrong(f"{attempt.kind}: RESOURCE_EXHAUSTED without RetryInfo, or out of its range")
        if failure and failure.code() is Code.UNAVAILABLE and not attempt.late:
            self.wrong(f"{attempt.kind}: UNAVAILABLE while nobody stopped the server: {failure.details()}")

    def compare(self, images: Images, wanted: Images) -> None:
        """Count pictures, and those that are not what they should be."""
        if images.shape != wanted.shape:
            self.note("wrong samples", len(wanted))
        else:
            self.note("wrong samples", int((images != wanted).reshape(len(wanted), -1).any(axis=1).sum()))
        self.note("samples compared", len(wanted))


class Recorded:
    """A stub that tells a ledger of every call, those that a client repeats by itself too."""

    def __init__(self, stub: Any, ledger: Ledger) -> None:
        self._stub = stub
        self._ledger = ledger

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None, metadata: Sequence[tuple[str, str]]) -> Any:
            if self._ledger.over.is_set():
                raise RemoteError("the soak is over")
            attempt = self._ledger.begin(kind)
            more = {"timeout": timeout, "metadata": [*metadata, ("x-request-id", attempt.identity)]}
            if kind == "SampleStream":
                return RecordedStream(getattr(self._stub, kind)(request, **more), attempt, self._ledger)
            try:
                reply = getattr(self._stub, kind)(request, **more)
            except grpc.RpcError as failure:
                self._ledger.end(attempt, failure)
                raise
            self._ledger.end(attempt)
            return reply

        return call


class RecordedStream:
    """A stream's replies, counted."""

    def __init__(self, call: Any, attempt: Attempt, ledger: Ledger) -> None:
        self._call, self._attempt, self._ledger = call, attempt, ledger

    def __iter__(self) -> Iterator[Any]:
        try:
            for reply in self._call:
                self._attempt.replies += 1
                yield reply
        except grpc.RpcError as failure:
            self._ledger.end(self._attempt, failure)
            raise
        self._ledger.end(self._attempt)

    def cancel(self) -> None:
        self._call.cancel()


def retry_delay(failure: Any) -> float:
    """Return what google.rpc.RetryInfo says, in seconds; 0 where it is not there."""
    status, info = rpc_status.from_call(failure), RetryInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return 0.0


def lost(failed: list[Attempt], log: list[dict[str, Any]]) -> list[Attempt]:
    """Return the calls that failed although the server had accepted them.

    It had where it began to answer, where its log has another end than the caller, or where the call was made before
    the SIGTERM and its status does not say that it had not.
    """
    ends = {each["request_id"]: each["code"] for each in log if "code" in each}
    return [
        each
        for each in failed
        if each.replies
        or ends.get(each.identity, each.code) != each.code
        or (each.since < 0 and each.code not in TURNED_AWAY and not each.kind.startswith("burst"))
    ]
