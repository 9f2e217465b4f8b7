"""How a call is turned down: a status code with one documented meaning (sampling.proto), and when to come back."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from serve.text import one_line

Code = grpc.StatusCode


class Refusal(Exception):
    """A call that is answered with a status.

    Args:
        code: The status code.
        message: One line: what was expected, what came, what to do.
        retry_after: Seconds after which the same call may succeed; None where it never will.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = one_line(message)  # it travels in a header, which has a most, and knows no lone surrogates
        self.retry_after = retry_after

    def metadata(self) -> list[tuple[str, Any]]:
        """Return the trailing metadata: google.rpc.RetryInfo, and the same for gRPC's own retry policies."""
        if self.retry_after is None:
            return []
        delay = Duration()
        delay.FromNanoseconds(int(self.retry_after * 1e9))
        packed = Packed()
        packed.Pack(RetryInfo(retry_delay=delay))
        number: int = self.code.value[0]
        status = rpc_status.to_status(Status(code=number, message=self.message, details=[packed]))
        return [*status.trailing_metadata, ("grpc-retry-pushback-ms", str(int(self.retry_after * 1000)))]


def invalid(message: str) -> Refusal:
    """Return the refusal of a request that is wrong in itself."""
    return Refusal(Code.INVALID_ARGUMENT, message)
