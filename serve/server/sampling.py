"""The service balancedvae.sampling.v1: pictures by address, or of the caller's own noise."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import numpy as np

from serve.encoding import encode
from serve.engine import Images
from serve.noise import INDICES, Noise
from serve.server.batcher import Request
from serve.server.models import Model, Registry
from serve.server.refusal import invalid
from serve.server.security import CALLER
from serve.server.telemetry import Telemetry
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

SERVICE = wire.DESCRIPTOR.services_by_name["SamplingService"].full_name
MOST_TEMPERATURE = 100.0
MOST_NOISE = 1000.0  # the hottest noise that a seed gives stays below it
FILES = {wire.ENCODING_PNG: "png", wire.ENCODING_JPEG: "jpeg", wire.ENCODING_WEBP: "webp"}
PRIORITIES = {wire.PRIORITY_INTERACTIVE: "interactive", wire.PRIORITY_BULK: "bulk"}


class Encoders:
    """Threads that turn pictures into files, beside the event loop; as many as cores."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._size = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="encode")

    async def encode(self, images: Sequence[Images], kind: str) -> list[bytes]:
        """Return a file a picture, in order."""
        began, loop = time.monotonic(), asyncio.get_running_loop()
        parts = [part for each in images for part in np.array_split(each, min(self._size, len(each)))]
        files = await asyncio.gather(*(loop.run_in_executor(self._pool, _encode, part, kind) for part in parts))
        self._telemetry.encode.labels(kind).observe(time.monotonic() - began)
        return [file for part in files for file in part]


class SamplingService(rpc.SamplingServiceServicer):
    """The calls. What is wrong with one is a Refusal, which the gate answers."""

    def __init__(self, registry: Registry, encoders: Encoders) -> None:
        self._registry = registry
        self._encoders = encoders

    async def Sample(self, request: wire.SampleRequest, context: Any) -> wire.SampleResponse:  # noqa: N802 (gRPC's name)
        wanted = request.range
        model = self._registry.get(wanted.model, wanted.version)
        job = range_request(model, wanted, context, one_message=True)
        CALLER.get().spend(wanted.count)
        async with aclosing(model.batcher.run(job)) as chunks:
            return wire.SampleResponse(chunk=await self._chunk(model, wanted, wanted.start, await anext(chunks)))

    async def SampleStream(self, request: wire.SampleStreamRequest, context: Any) -> None:  # noqa: N802
        wanted = request.range
        model = self._registry.get(wanted.model, wanted.version)
        job = range_request(model, wanted, context, one_message=False)
        caller, at = CALLER.get(), wanted.start
        async with aclosing(model.batcher.run(job)) as chunks:
            async for images in chunks:
                chunk = await self._chunk(model, wanted, at, images)
                await caller.pace(chunk.count)
                # Returns once HTTP/2's flow control has let the message go.
                await context.write(wire.SampleStreamResponse(chunk=chunk))
                at += chunk.count

    async def Decode(self, request: wire.DecodeRequest, context: Any) -> wire.DecodeResponse:  # noqa: N802
        model = self._registry.get(request.model, request.version)
        size = model.card.noise_size
        if len(request.noise) % (4 * size):
            raise invalid(
                f"noise must be float32 [count, {size}], {4 * size} bytes a sample. Received: {len(request.noise)}"
            )
        noise = np.frombuffer(request.noise, "<f4").reshape(-1, size)
        job = noise_request(model, noise, context, priority(request.priority, "interactive"))
        CALLER.get().spend(len(noise))
        asked = wire.Range(encoding=request.encoding, temperature=0)
        check_encoding(request.encoding)
        async with aclosing(model.batcher.run(job)) as chunks:
            return wire.DecodeResponse(chunk=await self._chunk(model, asked, 0, await anext(chunks)))

    async def ListModels(self, request: wire.ListModelsRequest, context: Any) -> wire.ListModelsResponse:  # noqa: N802
        return wire.ListModelsResponse(models=map(_describe, self._registry.models()))

    async def GetModel(self, request: wire.GetModelRequest, context: Any) -> wire.GetModelResponse:  # noqa: N802
        return wire.GetModelResponse(model=_describe(self._registry.get(request.model, request.version)))

    async def _chunk(self, model: Model, wanted: wire.Range, start: int, images: Sequence[Images]) -> wire.Chunk:
        height, width, channels = model.card.image_shape
        encoding = wanted.encoding or wire.ENCODING_RAW
        chunk = wire.Chunk(
            start=start,
            count=sum(map(len, images)),
            seed=wanted.seed,
            temperature=_temperature(wanted),
            digest=model.digest,
            height=height,
            width=width,
            channels=channels,
            encoding=encoding,
        )
        if encoding in FILES:
            chunk.files.extend(await self._encoders.encode(images, FILES[encoding]))
        else:
            chunk.pixels = b"".join(each.data for each in images)
        return chunk


def range_request(model: Model, wanted: wire.Range, context: Any, one_message: bool) -> Request:
    """Return the request for a range.

    Raises:
        Refusal: INVALID_ARGUMENT, a range that no model gives, or more than one message holds.
    """
    temperature, limits = _temperature(wanted), model.limits
    if not wanted.count:
        raise invalid("count must be 1 or more. Received: 0")
    if wanted.start + wanted.count > INDICES:
        raise invalid(f"start + count must be 2^63 or less. Received: {wanted.start} + {wanted.count}")
    if not 0 <= temperature <= MOST_TEMPERATURE:  # nor NaN
        raise invalid(f"temperature must be from 0 to {MOST_TEMPERATURE:.0f}. Received: {temperature}")
    if one_message and wanted.count > limits.count:
        most = f"count must be {limits.count} or less in one message. Received: {wanted.count}"
        raise invalid(f"{most}; ask for less at a time, or use SampleStream")
    check_encoding(wanted.encoding)
    chunk, ahead = (wanted.count, 1) if one_message else (limits.chunk, limits.ahead)
    default = "interactive" if one_message else "bulk"
    noise = model.noise(wanted.seed, wanted.start, temperature)
    return Request(noise, wanted.count, chunk, ahead, priority(wanted.priority, default), deadline(context))


def noise_request(model: Model, noise: Noise, context: Any, priority: str) -> Request:
    """Return the request for the pictures of noise [n, noise_size].

    Raises:
        Refusal: INVALID_ARGUMENT, too little or too much of it, or values that are no noise.
    """
    most = model.limits.count
    if not 1 <= len(noise) <= most:
        raise invalid(f"noise must be for 1 to {most} samples. Received: {len(noise)}")
    largest = np.abs(noise).max()
    if not largest <= MOST_NOISE:  # nor NaN
        raise invalid(f"noise must be finite and within {MOST_NOISE:.0f} of 0. Received: {largest}")
    count = len(noise)
    return Request(lambda at, n: noise[at : at + n], count, count, 1, priority, deadline(context))


def priority(value: int, default: str) -> str:
    """Return a priority's class.

    Raises:
        Refusal: INVALID_ARGUMENT, no priority has this number.
    """
    if value and value not in PRIORITIES:
        raise invalid(f"priority must be one of {', '.join(wire.Priority.keys())}. Received: {value}")
    return PRIORITIES.get(value, default)  # type: ignore[call-overload, no-any-return]  # enums are ints here


def check_encoding(value: int) -> None:
    """Refuse an encoding that is none.

    Raises:
        Refusal: INVALID_ARGUMENT.
    """
    if value not in wire.Encoding.values():
        raise invalid(f"encoding must be one of {', '.join(wire.Encoding.keys())}. Received: {value}")


def deadline(context: Any) -> float:
    """Return a call's deadline in time.monotonic()'s seconds; infinity where it has none."""
    left = context.time_remaining()
    return math.inf if left is None else time.monotonic() + left


def _temperature(wanted: wire.Range) -> float:
    return wanted.temperature if wanted.HasField("temperature") else 1.0


def _encode(images: Images, kind: str) -> list[bytes]:
    return [encode(image, kind) for image in images]


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
        version=str(model.version),
        max_temperature=MOST_TEMPERATURE,
        max_noise=MOST_NOISE,
    )
