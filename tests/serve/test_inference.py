"""The Open Inference Protocol, asked by clients that are not ours."""

from __future__ import annotations

import asyncio
import queue
import subprocess
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2 as oip
from tritonclient.utils import InferenceServerException

from serve import Client, Engine, load
from serve.noise import draw
from tests.conftest import BIN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle))


def noise_input(noise: np.ndarray, module: object = triton) -> triton.InferInput:
    value = triton.InferInput("noise", list(noise.shape), "FP32")
    value.set_data_from_numpy(noise)
    return value


def test_the_server_and_its_model_describe_themselves(server: str) -> None:
    with triton.InferenceServerClient(server) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("smoke")
        assert client.is_model_ready("smoke", "1")
        assert not client.is_model_ready("smoke", "2")
        assert not client.is_model_ready("cats")
        assert client.get_server_metadata().name == "balanced-vae"
        described = client.get_model_metadata("smoke", as_json=True)
        assert described["versions"] == ["1"]
        assert described["inputs"] == [{"name": "noise", "datatype": "FP32", "shape": ["-1", "8"]}]
        assert described["outputs"] == [{"name": "images", "datatype": "UINT8", "shape": ["-1", "16", "16", "3"]}]
        config = client.get_model_config("smoke").config
        assert config.max_batch_size >= 32
        assert (config.input[0].name, list(config.input[0].dims)) == ("noise", [8])
        assert (config.output[0].name, list(config.output[0].dims)) == ("images", [16, 16, 3])


def test_noise_gives_what_our_own_client_gets(server: str, engine: Engine) -> None:
    noise = draw(7, 100, 21, 8)
    with triton.InferenceServerClient(server) as client, Client(server) as ours:
        reply = client.infer("smoke", [noise_input(noise)], request_id="me")
        assert np.array_equal(reply.as_numpy("images"), engine.decode(noise))
        assert np.array_equal(reply.as_numpy("images"), ours.model().decode(noise))
        response = reply.get_response()
        assert (response.id, response.model_version) == ("me", "1")
        assert response.parameters["digest"].string_param == engine.digest


def test_an_address_needs_no_noise(server: str, engine: Engine) -> None:
    with triton.InferenceServerClient(server) as client:
        reply = client.infer("smoke", [], parameters={"seed": 7, "start": 100, "count": 5})
        assert np.array_equal(reply.as_numpy("images"), engine.sample(7, 100, 5))
        largest = {"seed": str(2**64 - 1), "start": str(2**63 - 2), "count": 2, "temperature": 0.5}
        reply = client.infer("smoke", [], parameters=largest)
        assert np.array_equal(reply.as_numpy("images"), engine.sample(2**64 - 1, 2**63 - 2, 2, 0.5))


def test_futures_and_asyncio(server: str, engine: Engine) -> None:
    done: queue.Queue[tuple[int, object]] = queue.Queue()
    with triton.InferenceServerClient(server) as client:
        for seed in range(20):
            client.async_infer(
                "smoke",
                [noise_input(draw(seed, 0, seed + 1, 8))],
                lambda result, error, seed=seed: done.put((seed, error or result)),
                priority=1 + seed % 2,
            )
        for _ in range(20):
            seed, result = done.get(timeout=60)
            assert np.array_equal(result.as_numpy("images"), engine.sample(seed, 0, seed + 1))

    async def ask(client: triton_aio.InferenceServerClient, seed: int) -> bool:
        reply = await client.infer("smoke", [], parameters={"seed": seed, "count": 9})
        return np.array_equal(reply.as_numpy("images"), engine.sample(seed, 0, 9))

    async def all_of_them() -> list[bool]:
        async with triton_aio.InferenceServerClient(server) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(20)))

    assert all(asyncio.run(all_of_them()))


@pytest.mark.parametrize(
    ("noise", "parameters", "words"),
    [
        (np.zeros((2, 7), np.float32), {}, "FP32 [n, 8]"),
        (np.full((2, 8), np.nan, np.float32), {}, "finite"),
        (np.full((2, 8), 1e9, np.float32), {}, "within 1000"),
        (np.zeros((100_000, 8), np.float32), {}, "1 to"),
        (np.zeros((2, 8), np.float32), {"seed": 1}, "exclude each other"),
        (None, {"seed": -1}, "seed must be a whole number"),
        (None, {"seed": True}, "seed must be a whole number"),
        (None, {"seed": "1e3"}, "seed must be a whole number"),
        (None, {"count": 0}, "count must be 1 or more"),
        (None, {"temperature": "hot"}, "temperature must be a number"),
    ],
)
def test_what_is_wrong_is_said(
    server: str, noise: np.ndarray | None, parameters: dict[str, object], words: str
) -> None:
    inputs = [] if noise is None else [noise_input(noise)]
    with (
        triton.InferenceServerClient(server) as client,
        pytest.raises(InferenceServerException) as error,
    ):
        client.infer("smoke", inputs, parameters=parameters or None)
    assert words in error.value.message()
    assert "INVALID_ARGUMENT" in str(error.value.status())


INFER = "/inference.GRPCInferenceService/ModelInfer"
INPUT = oip.ModelInferRequest.InferInputTensor(name="noise", datatype="FP32", shape=[1, 8])
IMAGES = oip.ModelInferRequest.InferRequestedOutputTensor(name="images")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\x32\x00" * 2_000_000, "the one output is images. Received: 2000000"),
        (b"\x2a\x00" * 2_000_000, "the one input is noise. Received: 2000000"),
        (oip.ModelInferRequest(parameters={f"p{at}": oip.InferParameter() for at in range(65)}), "at most 64"),
        (oip.ModelInferRequest(raw_input_contents=[b"\0" * 32]), "one part for each input. Received: 1 for 0"),
        (oip.ModelInferRequest(inputs=[INPUT], raw_input_contents=[b"\0" * 16] * 2), "Received: 2 for 1"),
        (oip.ModelInferRequest(inputs=[INPUT], outputs=[IMAGES, IMAGES]), "the one output"),
    ],
)
def test_lists_that_are_longer_than_they_can_be(
    server: str, message: bytes | oip.ModelInferRequest, words: str
) -> None:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with grpc.insecure_channel(server) as channel:
        call = channel.unary_unary(INFER, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as error:
            call(data, timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.value.details()


def test_an_unknown_model_is_not_found(server: str) -> None:
    with (
        triton.InferenceServerClient(server) as client,
        pytest.raises(InferenceServerException) as error,
    ):
        client.infer("cats", [])
    assert "NOT_FOUND" in str(error.value.status())


def test_our_messages_are_the_protocols() -> None:
    """Each name, number and type is that of tritonclient's own descriptors (processes apart: one name space)."""
    code = """
import json, sys
from google.protobuf.descriptor import FieldDescriptor as F
from {module} import {name} as found
from {module} import {more} as also
table = {{}}
def walk(message):
    table[message.full_name] = {{
        field.name: [field.number, field.type, field.is_repeated,
                     field.message_type.full_name if field.message_type else ""] for field in message.fields}}
    for nested in message.nested_types:
        walk(nested)
for file in (found.DESCRIPTOR, also.DESCRIPTOR):
    for message in file.message_types_by_name.values():
        walk(message)
    for enum in file.enum_types_by_name.values():
        table[enum.full_name] = {{value.name: value.number for value in enum.values}}
    for service in file.services_by_name.values():
        table[service.full_name] = {{
            method.name: [method.input_type.full_name, method.output_type.full_name] for method in service.methods}}
print(json.dumps(table))
"""

    def table(module: str, name: str, more: str) -> dict[str, dict[str, object]]:
        import json

        text = code.format(module=module, name=name, more=more)
        return json.loads(
            subprocess.run([BIN / "python", "-c", text], capture_output=True, check=True, cwd=ROOT).stdout
        )

    ours = table("serve.stubs", "inference_pb2", "inference_pb2")
    theirs = table("tritonclient.grpc", "service_pb2", "model_config_pb2")
    assert len(ours) > 20
    for name, fields in ours.items():
        for field, what in fields.items():
            assert theirs[name][field] == what, f"{name}.{field}"
