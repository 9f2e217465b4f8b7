"""The Open Inference Protocol v2: a model as Triton would show it, `noise` in and `images` out.

Samples by address have no input, but the parameters `seed`, `start`, `count` and `temperature`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np

from serve.noise import Noise
from serve.server.models import Model, Registry
from serve.server.refusal import Refusal, invalid
from serve.server.requests import deadline, noise_request, range_request
from serve.server.security import CALLER
from serve.server.wire import with_pixels
from serve.server.work import Request
from serve.stubs import inference_pb2 as oip
from serve.stubs import inference_pb2_grpc as rpc
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.version import VERSION

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
MOST_PARAMETERS = 64  # of ours there are six; clients may send others, which mean nothing here
ADDRESS = {"seed": 2**64, "start": 2**63, "count": 2**63}


class InferenceService(rpc.GRPCInferenceServiceServicer):
    """The calls. What is wrong with one is a Refusal, which the gate answers."""

    def __init__(self, registry: Registry, delay: float) -> None:
        self._registry = registry
        self._delay = delay

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Any) -> oip.ServerLiveResponse:  # noqa: N802 (gRPC's name)
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Any) -> oip.ServerReadyResponse:  # noqa: N802
        return oip.ServerReadyResponse(ready=self._registry.working)

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Any) -> oip.ModelReadyResponse:  # noqa: N802
        try:
            model = self._registry.get(request.name, request.version)
        except Refusal:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=model.working)

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Any) -> oip.ServerMetadataResponse:  # noqa: N802
        return oip.ServerMetadataResponse(name="balanced-vae", version=VERSION, extensions=["model_configuration"])

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Any) -> oip.ModelMetadataResponse:  # noqa: N802
        model = self._registry.get(request.name, request.version)
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=model.name,
            versions=[str(each.version) for each in reversed(self._registry.models(model.name))],
            platform=PLATFORM,
            inputs=[tensor(name="noise", datatype="FP32", shape=[-1, model.card.noise_size])],
            outputs=[tensor(name="images", datatype="UINT8", shape=[-1, *model.card.image_shape])],
        )

    async def ModelConfig(self, request: oip.ModelConfigRequest, context: Any) -> oip.ModelConfigResponse:  # noqa: N802
        model = self._registry.get(request.name, request.version)
        batching = oip.ModelDynamicBatching(
            preferred_batch_size=[model.batch], max_queue_delay_microseconds=int(self._delay * 1e6)
        )
        config = oip.ModelConfig(
            name=model.name,
            platform=PLATFORM,
            backend=BACKEND,
            max_batch_size=model.limits.count,
            input=[oip.ModelInput(name="noise", data_type=oip.TYPE_FP32, dims=[model.card.noise_size])],
            output=[oip.ModelOutput(name="images", data_type=oip.TYPE_UINT8, dims=model.card.image_shape)],
            dynamic_batching=batching,
        )
        return oip.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        model = self._registry.get(request.model_name, request.model_version)
        job = _request(model, request, context)
        shape = [job.count, *model.card.image_shape]
        reply = oip.ModelInferResponse(
            model_name=model.name,
            model_version=str(model.version),
            id=request.id,
            parameters={
                "digest": oip.InferParameter(string_param=model.digest),
                "arithmetic": oip.InferParameter(string_param=model.arithmetic),
            },
            outputs=[oip.ModelInferResponse.InferOutputTensor(name="images", datatype="UINT8", shape=shape)],
        )
        with CALLER.get().spending(job.count):
            async with aclosing(model.batcher.run(job)) as chunks:
                # Held until the gate has sent it, as sampling's pictures are.
                yield with_pixels(reply, oip.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER, await anext(chunks))


def _request(model: Model, request: oip.ModelInferRequest, context: Any) -> Request:
    """Return the request of an inference, by its noise or its address."""
    _check_counts(request)
    given = {name: _value(parameter) for name, parameter in request.parameters.items()}
    rank = _whole(given, "priority", 2**32, 0)
    if request.inputs:
        if by_address := [name for name in (*ADDRESS, "temperature") if name in given]:
            raise invalid(f"the input noise and the parameter {by_address[0]} exclude each other; send one of them")
        job = noise_request(model, _noise(model, request), deadline(context), "bulk" if rank > 1 else "interactive")
    else:
        address = {name: _whole(given, name, end, 1 if name == "count" else 0) for name, end in ADDRESS.items()}
        temperature = given.get("temperature", 1.0)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise invalid(f"temperature must be a number. Received: {temperature!r}")
        wanted = wire.Range(temperature=temperature, **address)  # type: ignore[arg-type]  # to mypy any field
        wanted.priority = wire.PRIORITY_BULK if rank > 1 else wire.PRIORITY_INTERACTIVE
        job = range_request(model, wanted, deadline(context), one_message=True)
    timeout = _whole(given, "timeout", 2**63, 0)  # microseconds; 0: none
    job.deadline = min(job.deadline, time.monotonic() + timeout / 1e6 if timeout else math.inf)
    return job


def _check_counts(request: oip.ModelInferRequest) -> None:
    """Refuse lists that are longer than they can be, before anybody walks along them: a message holds millions."""
    inputs, raw, outputs = len(request.inputs), len(request.raw_input_contents), request.outputs
    if inputs > 1:
        raise invalid(f"the one input is noise. Received: {inputs} inputs")
    if raw > inputs:
        raise invalid(f"raw_input_contents has one part for each input. Received: {raw} for {inputs}")
    if len(outputs) > 1 or any(output.name != "images" for output in outputs):
        raise invalid(f"the one output is images. Received: {len(outputs)}, the first {outputs[0].name[:80]!r}")
    if len(request.parameters) > MOST_PARAMETERS:
        raise invalid(f"at most {MOST_PARAMETERS} parameters are taken. Received: {len(request.parameters)}")


def _noise(model: Model, request: oip.ModelInferRequest) -> Noise:
    size = model.card.noise_size
    wanted = f"the input should be noise, FP32 [n, {size}]"
    tensor = request.inputs[0]
    shape = list(tensor.shape[:8])
    if tensor.name != "noise" or tensor.datatype != "FP32" or len(shape) != 2 or shape[1] != size or shape[0] < 1:
        raise invalid(f"{wanted}. Received: {tensor.name[:80]!r}, {tensor.datatype[:20]!r} {shape}")
    if request.raw_input_contents:
        raw = request.raw_input_contents[0]
        if len(raw) != 4 * size * shape[0]:
            raise invalid(f"noise of shape {shape} has {4 * size * shape[0]} bytes. Received: {len(raw)}")
        return np.frombuffer(raw, "<f4").reshape(shape)
    values = np.fromiter(tensor.contents.fp32_contents, np.float32)
    if len(values) != size * shape[0]:
        raise invalid(f"noise of shape {shape} has {size * shape[0]} values. Received: {len(values)}")
    return values.reshape(shape)


def _value(parameter: oip.InferParameter) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, choice) if choice else None


def _whole(given: dict[str, Any], name: str, end: int, default: int) -> int:
    """Return a parameter that is a whole number below `end`, as an integer or as text."""
    value = given.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise invalid(f"{name} must be a whole number from 0, below {end}. Received: {str(value)[:80]!r}")
    return value
