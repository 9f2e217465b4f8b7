"""grpc.health.v1, Check and Watch.

Not grpc_health's own servicer: as of 1.81 its Watch forgets a service's other watchers when one of them leaves, and
one that does not read keeps the rest from hearing of a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serve.server.refusal import Code, Refusal

SERVICE = health.SERVICE_NAME
Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
    """One state for the server ("") and each of its services.

    Args:
        services: Their full names.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = ("", *services)
        self._serving = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Say from now on whether requests are taken."""
        if serving != self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Status:  # noqa: N802 (gRPC's name)
        if request.service not in self._services:
            raise Refusal(Code.NOT_FOUND, f"service must be one of {', '.join(self._services[1:])}, or empty")
        return Status(status=self._status())

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> AsyncIterator[Status]:  # noqa: N802
        known = request.service in self._services
        while True:
            changed = self._changed
            yield Status(status=self._status() if known else Status.SERVICE_UNKNOWN)
            await changed.wait()

    def _status(self) -> Any:
        return Status.SERVING if self._serving else Status.NOT_SERVING
