"""The service balancedvae.sampling.v1: pictures by address, or of the caller's own noise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from serve.model import MOST_NOISE, MOST_TEMPERATURE, Images
from serve.server.encoders import Encoders
from serve.server.models import Model, Registry
from serve.server.refusal import invalid
from serve.server.requests import deadline, noise_request, priority, range_request, temperature_of
from serve.server.security import CALLER
from serve.server.wire import with_pixels
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

SERVICE = wire.DESCRIPTOR.services_by_name["SamplingService"].full_name
CHUNK, PIXELS = wire.SampleResponse.CHUNK_FIELD_NUMBER, wire.Chunk.PIXELS_FIELD_NUMBER
FILES = {wire.ENCODING_PNG: "png", wire.ENCODING_JPEG: "jpeg", wire.ENCODING_WEBP: "webp"}


class SamplingService(rpc.SamplingServiceServicer):
    """The calls. What is wrong with one is a Refusal, which the gate answers.

    Pictures are yielded, also where there is one message of them: the gate goes on once they have left, and until then
    they are held against the server's budget.
    """

    def __init__(self, registry: Registry, encoders: Encoders) -> None:
        self._registry = registry
        self._encoders = encoders

    async def Sample(self, request: wire.SampleRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802 (gRPC's name)
        wanted = request.range
        model = self._registry.get(wanted.model, wanted.version)
        job = range_request(model, wanted, deadline(context), one_message=True)
        with CALLER.get().spending(wanted.count):
            async with aclosing(model.batcher.run(job)) as chunks:
                yield await self._reply(model, wanted, wanted.start, await anext(chunks))

    async def SampleStream(self, request: wire.SampleStreamRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        wanted = request.range
        model = self._registry.get(wanted.model, wanted.version)
        job = range_request(model, wanted, deadline(context), one_message=False)
        caller, at = CALLER.get(), wanted.start
        with caller.holding(job.held):
            async with aclosing(model.batcher.run(job)) as chunks:
                async for images in chunks:
                    count = sum(map(len, images))
                    reply = await self._reply(model, wanted, at, images)
                    await caller.pace(count)
                    yield reply
                    at += count

    async def Decode(self, request: wire.DecodeRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        model = self._registry.get(request.model, request.version)
        size = model.card.noise_size
        if len(request.noise) % (4 * size):
            raise invalid(
                f"noise must be float32 [count, {size}], {4 * size} bytes a sample. Received: {len(request.noise)}"
            )
        noise = np.frombuffer(request.noise, "<f4").reshape(-1, size)
        rank = priority(request.priority, "interactive")
        job = noise_request(model, noise, deadline(context), rank, request.encoding)
        asked = wire.Range(encoding=request.encoding, temperature=0)
        with CALLER.get().spending(len(noise)):
            async with aclosing(model.batcher.run(job)) as chunks:
                yield await self._reply(model, asked, 0, await anext(chunks))

    async def ListModels(self, request: wire.ListModelsRequest, context: Any) -> wire.ListModelsResponse:  # noqa: N802
        return wire.ListModelsResponse(models=map(_describe, self._registry.models()))

    async def GetModel(self, request: wire.GetModelRequest, context: Any) -> wire.GetModelResponse:  # noqa: N802
        return wire.GetModelResponse(model=_describe(self._registry.get(request.model, request.version)))

    async def _reply(self, model: Model, wanted: wire.Range, start: int, images: Sequence[Images]) -> bytes:
        """Return a SampleResponse, SampleStreamResponse or DecodeResponse, which are the same on the wire."""
        height, width, channels = model.card.image_shape
        encoding = wanted.encoding or wire.ENCODING_RAW
        chunk = wire.Chunk(
            start=start,
            count=sum(map(len, images)),
            seed=wanted.seed,
            temperature=temperature_of(wanted),
            digest=model.digest,
            arithmetic=model.arithmetic,
            height=height,
            width=width,
            channels=channels,
            encoding=encoding,
        )
        if encoding not in FILES:
            return with_pixels(chunk, PIXELS, images, inside=CHUNK)
        chunk.files.extend(await self._encoders.encode(images, FILES[encoding]))
        return wire.SampleResponse(chunk=chunk).SerializeToString()


def _describe(model: Model) -> wire.Model:
    height, width, channels = model.card.image_shape
    return wire.Model(
        name=model.name,
        digest=model.digest,
        height=height,
        width=width,
        channels=channels,
        noise_size=model.card.noise_size,
        card=model.card.to_json(),
        max_count=model.limits.count,
        max_files=model.limits.files,
        version=str(model.version),
        arithmetic=model.arithmetic,
        max_temperature=MOST_TEMPERATURE,
        max_noise=MOST_NOISE,
    )
