"""The gallery's page, and what a browser needs to make pictures itself: ONNX Runtime, and models that are shared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator
from importlib.resources import files

from aiohttp import web

from serve.server.http.answering import ASK, Asked, Handler, Part, Send, forever, of
from serve.server.http.routes import PAGES, RUNTIME
from serve.server.models import Registry
from serve.server.refusal import Code, Refusal

PAGE = files(__package__) / "page"
ORT = files(__package__) / "ort"  # `make browser` fills it
# The page runs nothing and asks for nothing but what is here; models are run by WebAssembly.
POLICY = (
    "default-src 'none'; img-src 'self' blob:; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PACKED = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
# With nothing of anybody else's in it, a page may use threads.
ALONE = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Gallery:
    """Files, all of them read before the first request: no address leads to any other.

    Args:
        registry: The models.
        secure: Whether tokens are asked for.
        share: Whether browsers are to make pictures themselves.
    """

    def __init__(self, registry: Registry, secure: bool, share: bool) -> None:
        self._registry, self._forever = registry, forever(secure)
        self._pages = {name: _tagged((PAGE / name).read_bytes()) for name in ("index.html", *PAGES)}
        there = [name for name in RUNTIME if share and (ORT / f"{name}.gz").is_file()]
        self._runtime = {name: _tagged((ORT / f"{name}.gz").read_bytes()) for name in there}
        self.handlers: dict[str, Handler] = {"page": self.page, "runtime": self.runtime, "weights": self.weights}

    @property
    def in_browser(self) -> bool:
        """Whether browsers can make pictures themselves."""
        return self._runtime.keys() == RUNTIME.keys()

    async def page(self, asked: Asked, send: Send) -> web.StreamResponse:
        """Answer with a file of the page."""
        name = asked.values.get("file", "index.html")
        data, tag = self._pages[name]
        headers = {"ETag": f'"{tag}"', "Cache-Control": ASK, "Content-Security-Policy": POLICY, **ALONE}
        if asked.has(tag):
            return web.Response(status=304, headers=headers)
        return web.Response(body=data, content_type=PAGES.get(name, "text/html"), charset="utf-8", headers=headers)

    async def runtime(self, asked: Asked, send: Send) -> web.StreamResponse:
        """Answer with a file of ONNX Runtime, packed as it lies here: unpacking costs more than a stranger may."""
        name = asked.values["part"]
        if name not in self._runtime:
            raise Refusal(Code.NOT_FOUND, "this server has no ONNX Runtime for browsers; see docs/http.md")
        if not PACKED.search(asked.request.headers.get("Accept-Encoding", "")):
            raise Refusal(Code.FAILED_PRECONDITION, "this file is sent packed; send `Accept-Encoding: gzip`")
        data, tag = self._runtime[name]
        headers = {"ETag": f'"{tag}"', "Cache-Control": ASK, "Content-Security-Policy": POLICY, **ALONE}
        headers |= {"Content-Type": RUNTIME[name], "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        return await self._file(asked, send, tag, data, headers)

    async def weights(self, asked: Asked, send: Send) -> web.StreamResponse:
        """Answer with a model's file, as it was loaded."""
        model = self._registry.of_digest(asked.values["digest"])
        if model.file is None:
            raise Refusal(Code.PERMISSION_DENIED, "this server keeps its models; --share-models gives them to callers")
        headers = {"ETag": f'"{model.digest}"', "Cache-Control": self._forever, **of(model)}
        headers["Content-Type"] = "application/octet-stream"
        return await self._file(asked, send, model.digest, model.file, headers)

    async def _file(
        self, asked: Asked, send: Send, tag: str, data: bytes, headers: dict[str, str]
    ) -> web.StreamResponse:
        if asked.has(tag):
            return web.Response(status=304, headers=headers)
        response = web.StreamResponse(headers=headers)
        response.content_length = len(data)
        return await send(response, _whole(data))


def _tagged(data: bytes) -> tuple[bytes, str]:
    return data, hashlib.sha256(data).hexdigest()[:32]


async def _whole(data: bytes) -> AsyncGenerator[Part]:
    yield data
