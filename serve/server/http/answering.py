"""What a handler is given, and how it answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from serve.server.http.routes import Route
from serve.server.models import Model

FOREVER = "max-age=31536000, immutable"
BRIEFLY = "max-age=60"  # how long a name leads to the same model
ASK = "no-cache"  # kept, but asked about each time


@dataclass(frozen=True)
class Asked:
    """A request, understood.

    Attributes:
        request: As it came.
        route: Which of the table it is.
        values: Its parameters, of their types, with defaults.
    """

    request: web.Request
    route: Route
    values: Mapping[str, Any]

    def has(self, tag: str) -> bool:
        """Tell whether the caller has what this ETag stands for."""
        return any(each.value in (tag, "*") for each in self.request.if_none_match or ())


Part = bytes | memoryview
# Sends a reply, and returns once the connection has taken it.
Send = Callable[[web.StreamResponse, AsyncGenerator[Part]], Awaitable[web.StreamResponse]]
Handler = Callable[[Asked, Send], Awaitable[web.StreamResponse]]


def forever(secure: bool) -> str:
    """Return what Cache-Control says of what never changes.

    What came for a token is for who has it: shared caches would give it to others.
    """
    return f"{'private' if secure else 'public'}, {FOREVER}"


def of(model: Model) -> dict[str, str]:
    """Return the headers that say which model made a reply."""
    return {"X-Model-Digest": model.digest, "X-Arithmetic": model.arithmetic}
