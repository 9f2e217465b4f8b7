"""The service balancedvae.admin.v1: models in and out of a running server."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from serve.errors import ServeError
from serve.server.folder import Loader
from serve.server.models import MOST_NAMES, Registry
from serve.server.refusal import Code, Refusal, invalid
from serve.server.security import CALLER
from serve.stubs.admin.v1 import admin_pb2 as wire
from serve.stubs.admin.v1 import admin_pb2_grpc as rpc
from serve.text import one_line, quoted

SERVICE = wire.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminService(rpc.AdminServiceServicer):
    """The calls, for callers that may make them."""

    def __init__(self, registry: Registry, loader: Loader) -> None:
        self._registry = registry
        self._loader = loader

    async def LoadModel(self, request: wire.LoadModelRequest, context: Any) -> wire.LoadModelResponse:  # noqa: N802 (gRPC's name)
        _check_allowed()
        try:
            files = await self._loader.listing()
        except ServeError as error:
            raise Refusal(Code.FAILED_PRECONDITION, str(error)) from None
        if request.file not in files:
            have = shorten(", ".join(files), MOST_NAMES, placeholder=" ...") or "it has none"
            raise Refusal(
                Code.NOT_FOUND, f"file must be one of the model folder's: {have}. Received: {quoted(request.file)}"
            )
        path = files[request.file]
        try:
            model = await self._loader.load(path)
        except ServeError as error:
            # A caller must not learn where the folder is.
            text = str(error).replace(one_line(str(path)), path.name)
            raise Refusal(Code.FAILED_PRECONDITION, text) from None
        return wire.LoadModelResponse(model=model.name, version=str(model.version), digest=model.digest)

    async def UnloadModel(self, request: wire.UnloadModelRequest, context: Any) -> wire.UnloadModelResponse:  # noqa: N802
        _check_allowed()
        if not request.model:
            raise invalid("model must be named")
        if request.version:
            models = [self._registry.get(request.model, request.version)]
        else:
            models = self._registry.models(request.model)
        for model in models:
            self._loader.unload(model)
        return wire.UnloadModelResponse()


def _check_allowed() -> None:
    caller = CALLER.get()
    if not caller.admin:
        raise Refusal(Code.PERMISSION_DENIED, f"the token {caller.name} has no `admin = true`; ask with one that has")
