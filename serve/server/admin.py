"""The service balancedvae.admin.v1: models in and out of a running server."""

from __future__ import annotations

from typing import Any

from serve.errors import ServeError
from serve.server.folder import Loader
from serve.server.models import Registry
from serve.server.refusal import Code, Refusal, invalid
from serve.server.security import CALLER
from serve.stubs.admin.v1 import admin_pb2 as wire
from serve.stubs.admin.v1 import admin_pb2_grpc as rpc

SERVICE = wire.DESCRIPTOR.services_by_name["AdminService"].full_name


class AdminService(rpc.AdminServiceServicer):
    """The calls, for callers that may make them."""

    def __init__(self, registry: Registry, loader: Loader) -> None:
        self._registry = registry
        self._loader = loader

    async def LoadModel(self, request: wire.LoadModelRequest, context: Any) -> wire.LoadModelResponse:  # noqa: N802 (gRPC's name)
        _check_allowed()
        files = self._loader.listing()
        if request.file not in files:
            have = ", ".join(files) or "it has none"
            raise Refusal(
                Code.NOT_FOUND, f"file must be one of the model folder's: {have}. Received: {request.file[:80]!r}"
            )
        try:
            model = await self._loader.load(files[request.file])
        except ServeError as error:
            # Where the folder is, is nobody's business.
            text = str(error).replace(str(files[request.file]), request.file)
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
