"""The client for asyncio; `sync` with its awaits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import numpy.typing as npt

from serve.client.protocol import Connection, Encoding, Options, Patience, Priority, Served, choose
from serve.engine import Images
from serve.errors import RemoteError
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

Reply = TypeVar("Reply")


class AsyncModel(Served):
    """A model on a server. All its methods raise RemoteError."""

    def __init__(self, client: AsyncClient, model: wire.Model) -> None:
        super().__init__(model)
        self._client = client

    async def sample(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> Images:
        """Return up to `batch` samples of a seed: uint8 [count, height, width, channels]."""
        request = wire.SampleRequest(range=self._range(seed, start, count, temperature, priority))
        reply = await self._client.call(lambda stub, more: stub.Sample(request, **more), self)
        return self._images(reply.chunk)

    async def decode(self, noise: npt.ArrayLike, priority: Priority | None = None) -> Images:
        """Return the pictures of noise [n, noise_size], n up to `batch`: uint8 [n, height, width, channels]."""
        request = self._noise(noise, priority)
        reply = await self._client.call(lambda stub, more: stub.Decode(request, **more), self)
        return self._images(reply.chunk)

    async def stream(
        self, seed: int, start: int, count: int, temperature: float = 1.0, priority: Priority | None = None
    ) -> AsyncGenerator[tuple[int, Images]]:
        """Yield (first index, images) for a range of any length, in order."""
        wanted = self._range(seed, start, count, temperature, priority)
        async for chunk in self._chunks(wanted):
            yield chunk.start, self._images(chunk)

    async def files(
        self,
        seed: int,
        start: int,
        count: int,
        temperature: float = 1.0,
        priority: Priority | None = None,
        encoding: Encoding = "png",
    ) -> AsyncGenerator[tuple[int, bytes]]:
        """Yield (index, a file's bytes) for a range of any length, in order; the server encodes."""
        wanted = self._range(seed, start, count, temperature, priority, encoding)
        async for chunk in self._chunks(wanted):
            for each in enumerate(self._checked(chunk).files, chunk.start):
                yield each

    async def _chunks(self, wanted: wire.Range) -> AsyncGenerator[wire.Chunk]:
        stop, patience = wanted.start + wanted.count, self._client.patience()
        while True:
            call = self._client.stub.SampleStream(wire.SampleStreamRequest(range=wanted), **self._client.more(None))
            try:
                async for reply in call:
                    patience.progress()
                    yield reply.chunk
                    wanted.start = reply.chunk.start + reply.chunk.count
                    wanted.count = stop - wanted.start
                return
            except grpc.RpcError as failure:
                await self._client.wait(patience, failure, self)
            finally:
                call.cancel()


class AsyncClient(Connection):
    """A connection to serve-vae; an asynchronous context manager, made on a running event loop.

    Args:
        address: HOST:PORT, or unix:PATH.
        options: Token, TLS, patience.

    Raises:
        RemoteError: a file of the options cannot be read.
    """

    def __init__(self, address: str, options: Options = Options()) -> None:  # noqa: B008 (it is frozen)
        super().__init__(address, options)
        secure = options.credentials()
        self._channel = (
            grpc.aio.secure_channel(address, secure, options.channel_options)
            if secure
            else grpc.aio.insecure_channel(address, options.channel_options)
        )
        self.stub: Any = rpc.SamplingServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def models(self) -> list[AsyncModel]:
        """Return the server's models, every version.

        Raises:
            RemoteError: no server is there.
        """
        return [AsyncModel(self, model) for model in await self._models()]

    async def model(self, name: str = "", version: str = "") -> AsyncModel:
        """Return the model called `name`, or the only one; its newest version, or the one of a number or digest.

        Raises:
            RemoteError: no server is there, or it has no such model.
        """
        return AsyncModel(self, choose(self.address, await self._models(), name, version))

    async def _models(self) -> list[wire.Model]:
        reply = await self.call(lambda stub, more: stub.ListModels(wire.ListModelsRequest(), **more))
        return list(reply.models)

    async def call(self, what: Callable[[Any, dict[str, Any]], Awaitable[Reply]], model: Served | None = None) -> Reply:
        """Make a call, and again where that may help; its failures are RemoteErrors."""
        patience = self.patience()
        while True:
            try:
                reply = await what(self.stub, self.more(self.options.timeout))
                self._met = True
                return reply
            except grpc.RpcError as failure:
                await self.wait(patience, failure, model)

    async def wait(self, patience: Patience, failure: grpc.RpcError, model: Served | None) -> None:
        """Pause before a call is made again.

        Raises:
            RemoteError: it should not be.
        """
        try:
            pause = patience.pause(failure)
        except RemoteError as error:
            raise (model._sharpen(error, failure) if model else error) from None
        await asyncio.sleep(pause)
