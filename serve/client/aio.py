"""The client for asyncio; `sync` with its awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
import numpy.typing as npt
from PIL.Image import Image

from serve.client.options import Options
from serve.client.protocol import Connection, Encoding, Priority, Served, choose
from serve.client.tries import Streaming, Tries
from serve.encoding import pictures
from serve.errors import Rejected
from serve.model import Images
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

Reply = TypeVar("Reply")


class AsyncModel(Served):
    """A model on a server: `RemoteModel` for asyncio."""

    def __init__(self, client: AsyncClient, model: wire.Model) -> None:
        super().__init__(model)
        self._client = client

    async def sample(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> Images:
        """As `RemoteModel.sample`."""
        wanted = self._range(seed, start, count, temperature, priority)
        if not 1 <= count <= self.batch:
            return self._joined([self._images(chunk, chunk.count) async for chunk in self._chunks(wanted)])
        request = wire.SampleRequest(range=wanted)
        reply = await self._client.call(lambda stub, more: stub.Sample(request, **more), self)
        return self._images(reply.chunk, count)

    async def pictures(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> list[Image]:
        """As `RemoteModel.pictures`."""
        return pictures(await self.sample(seed, start, count, temperature, priority))

    async def decode(self, noise: npt.ArrayLike, priority: Priority | None = None) -> Images:
        """As `RemoteModel.decode`."""
        return self._joined([await self._decode(request, count) for request, count in self._requests(noise, priority)])

    async def stream(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> AsyncGenerator[tuple[int, Images]]:
        """As `RemoteModel.stream`."""
        wanted = self._range(seed, start, count, temperature, priority)
        async for chunk in self._chunks(wanted):
            yield chunk.start, self._images(chunk, chunk.count)

    async def files(
        self,
        seed: int,
        start: int,
        count: int,
        temperature: float = 1.0,
        priority: Priority | None = None,
        encoding: Encoding = "png",
    ) -> AsyncGenerator[tuple[int, bytes]]:
        """As `RemoteModel.files`."""
        wanted = self._range(seed, start, count, temperature, priority, encoding)
        async for chunk in self._chunks(wanted):
            for each in self._files(chunk):
                yield each

    async def _decode(self, request: wire.DecodeRequest, count: int) -> Images:
        reply = await self._client.call(lambda stub, more: stub.Decode(request, **more), self)
        return self._images(reply.chunk, count)

    async def _chunks(self, wanted: wire.Range) -> AsyncGenerator[wire.Chunk]:
        tries = Streaming(self._client, self, wanted)
        while tries.left:
            with tries:
                call = self._client.stub.SampleStream(tries.request, **self._client.more(None))
                try:
                    async for reply in call:
                        yield tries.take(reply.chunk)
                        tries.be_patient()  # the reader may have taken long over these images
                finally:
                    call.cancel()
            await self._client.wait(tries.pause)


class AsyncClient(Connection[asyncio.Event]):
    """A connection to serve-vae; an asynchronous context manager, made on a running event loop.

    Args:
        address: HOST:PORT, or unix:PATH.
        options: Token, TLS, patience.

    Raises:
        RemoteError: it is no address; the options for TLS do not go together, or a file of theirs cannot be used.
    """

    def __init__(self, address: str, options: Options = Options()) -> None:  # noqa: B008 (it is frozen)
        super().__init__(address, options, asyncio.Event())
        secure = options.credentials()
        self._channel = (
            grpc.aio.secure_channel(address, secure, options.channel_options(address))
            if secure
            else grpc.aio.insecure_channel(address, options.channel_options(address))
        )
        self.stub: Any = rpc.SamplingServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Whatever is under way, or called later, raises Closed."""
        self._closed.set()
        await self._channel.close()

    async def models(self) -> list[AsyncModel]:
        """Return the server's models, every version.

        Raises:
            RemoteError: no server is there.
        """
        return [AsyncModel(self, model) for model in await self._models()]

    async def model(self, name: str = "", version: str = "") -> AsyncModel:
        """Return the model called `name`, or the only one; its newest version, or the one of a number or digest.

        A server that still loads its models is waited for, as long as `Options.patience` says.

        Raises:
            RemoteError: no server is there, or it has no such model.
        """
        request = wire.GetModelRequest(model=name, version=version)
        try:
            return AsyncModel(self, (await self.call(lambda stub, more: stub.GetModel(request, **more))).model)
        except Rejected:  # there is no such model; one of a digest may have any name
            return AsyncModel(self, choose(self.address, await self._models(), name, version))

    async def _models(self) -> list[wire.Model]:
        reply = await self.call(lambda stub, more: stub.ListModels(wire.ListModelsRequest(), **more))
        return list(reply.models)

    async def call(self, what: Callable[[Any, dict[str, Any]], Awaitable[Reply]], model: Served | None = None) -> Reply:
        """Make a call, and again where that may help; its failures are RemoteErrors."""
        tries = Tries(self, model)
        while True:
            with tries:
                return await what(self.stub, self.more(self.options.timeout))
            await self.wait(tries.pause)

    async def wait(self, seconds: float) -> None:
        """Wait, but no longer than the client is open."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
