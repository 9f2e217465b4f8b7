"""Exit with 0 where a server says it is serving: `python -m serve.healthcheck [ADDRESS]`.

For containers' and supervisors' health checks; it asks grpc.health.v1.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.server.settings import LISTEN

SECONDS = 3.0


def main(address: str) -> int:
    """Return 0 if the server at `address` is serving, else 1 with a line that says what it is instead."""
    with grpc.insecure_channel(address) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs leave the calls out
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    print(f"{address}: {status}", file=sys.stderr)
    return int(reply.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or [LISTEN])))
