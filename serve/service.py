"""The service: models behind balancedvae.sampling.v1, with health and reflection, on grpc.aio.

Every model has one thread that runs its engine. A request is cut into batches that queue there one after
the other, so requests take turns batch by batch and a huge one starves nobody; each has at most two batches
under way, one being sent while the next is computed, so a slow reader costs two batches of memory.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import signal
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.encoding import encode
from serve.engine import Engine, Images
from serve.errors import ServeError
from serve.noise import INDICES
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc

SERVICE = wire.DESCRIPTOR.services_by_name["SamplingService"].full_name
MESSAGE_BYTES = 4 * 2**20 - 2**16  # what a client with gRPC's defaults takes, less room for the rest
CHUNK_BYTES = 2**20
CONCURRENT_RPCS = 512

log = logging.getLogger("serve-vae")


class Model:
    """An engine and its one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.card.name
        sample_bytes = math.prod(engine.card.image_shape)
        self.max_count = max(1, MESSAGE_BYTES // sample_bytes)
        self.chunk = max(1, min(engine.batch, CHUNK_BYTES // sample_bytes))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)

    async def images(self, wanted: wire.Range, start: int, count: int) -> Images:
        """Return samples, computed when this call's turn comes."""
        temperature = wanted.temperature if wanted.HasField("temperature") else 1.0
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.engine.sample, wanted.seed, start, count, temperature)

    def describe(self) -> wire.Model:
        """Return the model as ListModels shows it."""
        card = self.engine.card
        height, width, channels = card.image_shape
        return wire.Model(
            name=self.name,
            digest=self.engine.digest,
            height=height,
            width=width,
            channels=channels,
            noise_size=card.noise_size,
            card=card.to_json(),
            max_count=self.max_count,
        )


class SamplingService(rpc.SamplingServiceServicer):
    """The RPCs. Errors are status codes whose message says what to change."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}
        self._encoders = ThreadPoolExecutor(thread_name_prefix="encode")

    async def Sample(self, request: wire.SampleRequest, context: Any) -> wire.SampleResponse:  # noqa: N802 (gRPC's name)
        """Give up to a message's worth of samples."""
        wanted = request.range
        model = await self._check(wanted, context)
        if wanted.count > model.max_count:
            text = f"count must be {model.max_count} or less in one message. Received: {wanted.count}; use SampleStream"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return wire.SampleResponse(chunk=await self._chunk(model, wanted, wanted.start, wanted.count))

    async def SampleStream(  # noqa: N802 (gRPC's name)
        self, request: wire.SampleStreamRequest, context: Any
    ) -> AsyncIterator[wire.SampleStreamResponse]:
        """Give any number of samples, in chunks, in order."""
        wanted = request.range
        model = await self._check(wanted, context)
        stop = wanted.start + wanted.count

        def begin(at: int) -> asyncio.Task[wire.Chunk]:
            return asyncio.create_task(self._chunk(model, wanted, at, min(model.chunk, stop - at)))

        following: asyncio.Task[wire.Chunk] | None = begin(wanted.start)
        try:
            for at in range(wanted.start + model.chunk, stop + model.chunk, model.chunk):
                assert following is not None
                chunk = await following
                following = begin(at) if at < stop else None
                yield wire.SampleStreamResponse(chunk=chunk)
        finally:
            if following is not None:
                following.cancel()

    async def ListModels(self, request: wire.ListModelsRequest, context: Any) -> wire.ListModelsResponse:  # noqa: N802
        """Give the models and their limits."""
        return wire.ListModelsResponse(models=[model.describe() for model in self._models.values()])

    async def _check(self, wanted: wire.Range, context: Any) -> Model:
        """Return the model asked for; abort the call on a range that no model gives."""
        name = wanted.model or (next(iter(self._models)) if len(self._models) == 1 else "")
        if name not in self._models:
            have = ", ".join(self._models)
            await context.abort(grpc.StatusCode.NOT_FOUND, f"model must be one of {have}. Received: {name[:80]!r}")
        problem = _problem(wanted)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        return self._models[name]

    async def _chunk(self, model: Model, wanted: wire.Range, start: int, count: int) -> wire.Chunk:
        images = await model.images(wanted, start, count)
        height, width, channels = model.engine.card.image_shape
        chunk = wire.Chunk(
            start=start,
            count=count,
            seed=wanted.seed,
            temperature=wanted.temperature if wanted.HasField("temperature") else 1.0,
            digest=model.engine.digest,
            height=height,
            width=width,
            channels=channels,
            encoding=wanted.encoding or wire.ENCODING_RAW,
        )
        if chunk.encoding == wire.ENCODING_PNG:
            loop = asyncio.get_running_loop()
            chunk.files.extend(await loop.run_in_executor(self._encoders, _encode_all, images))
        else:
            chunk.pixels = images.tobytes()
        return chunk


def _encode_all(images: Images) -> list[bytes]:
    return [encode(image, "png") for image in images]


def _problem(wanted: wire.Range) -> str | None:
    """Return what is wrong with a range, or None."""
    if not wanted.count:
        return "count must be 1 or more. Received: 0"
    if wanted.start + wanted.count > INDICES:
        return f"start + count must be 2^63 or less. Received: {wanted.start} + {wanted.count}"
    if wanted.encoding not in (wire.ENCODING_UNSPECIFIED, wire.ENCODING_RAW, wire.ENCODING_PNG):
        return f"encoding must be ENCODING_RAW or ENCODING_PNG. Received: {wanted.encoding}"
    temperature = wanted.temperature
    if not math.isfinite(temperature) or not 0 <= temperature <= 100:
        return f"temperature must be from 0 to 100. Received: {temperature}"
    return None


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach an address to listen on."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(engines: Sequence[Engine], address: str, grace: float) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is under way, for at most `grace` seconds.

    Raises:
        ServeError: the address is taken or not one of this machine's.
    """
    # Without SO_REUSEPORT a second server on the port is an error instead of a thief of requests.
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=CONCURRENT_RPCS)
    rpc.add_SamplingServiceServicer_to_server(SamplingService([Model(engine) for engine in engines]), server)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise ServeError(f"cannot listen on {address}: it is in use, or not this machine's; choose another") from None
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    for name in ("", SERVICE):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    for engine in engines:
        log.info("serving %s (%s, sha256 %s)", engine.card.name, engine.device, engine.digest[:12])
    host = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    log.info("listening on %s", host)
    await stopping.wait()
    log.info("stopping: no new requests; what is under way has %.0f s", grace)
    await status.enter_graceful_shutdown()
    await server.stop(grace)
