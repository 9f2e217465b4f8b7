"""A real server on a real socket."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from serve import Client, Engine, Options, load
from serve.encoding import FORMATS, encode
from serve.errors import RemoteError
from serve.healthcheck import main as healthcheck
from serve.sample_cli import main as sample_cli
from serve.server.models import FILE_BYTES
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, HOMES, assert_clear_error, command, serving


def test_samples_are_those_of_the_engine(server: str, smoke_bundle: Path) -> None:
    engine = Engine(load(smoke_bundle), batch=7)
    with Client(server) as client:
        model = client.model("smoke")
        assert model.digest == engine.digest
        assert model.card == engine.card
        assert np.array_equal(model.sample(7, 100, 5), engine.sample(7, 100, 5))
        parts = list(model.stream(7, 90, 333, temperature=0.7))
        assert np.array_equal(np.concatenate([images for _, images in parts]), engine.sample(7, 90, 333, 0.7))
        assert parts[0][0] == 90


def test_many_clients_at_once_each_get_their_own(server: str, smoke_bundle: Path) -> None:
    engine = Engine(load(smoke_bundle))
    wrong: list[int] = []

    def ask(seed: int) -> None:
        with Client(server) as client:
            got = np.concatenate([images for _, images in client.model().stream(seed, seed, 90)])
        if not np.array_equal(got, engine.sample(seed, seed, 90)):
            wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_sample_cli_through_the_server_writes_the_same_folder(server: str, smoke_bundle: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    command("sample-cli", "--model", smoke_bundle, "--n", 60, "--seed", 7, "--batch", 9, "--out", here)
    result = command("sample-cli", "--server", server, "--n", 5, "--seed", 7, "--start", 40, "--out", there)
    assert result.returncode == 0, result.stderr
    for index in range(40, 45):
        name = f"{index:09d}.png"
        assert (there / name).read_bytes() == (here / name).read_bytes()
    (here / f"{50:09d}.png").unlink()
    completed = command("sample-cli", "--server", server, "--model", "smoke", "--n", 60, "--seed", 7, "--out", here)
    assert "1 made" in completed.stdout, completed.stderr


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"count": 0}, grpc.StatusCode.INVALID_ARGUMENT, "count must be 1 or more"),
        ({"count": 10**6}, grpc.StatusCode.INVALID_ARGUMENT, "use SampleStream"),
        ({"start": 2**63}, grpc.StatusCode.INVALID_ARGUMENT, "2^63"),
        ({"temperature": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"temperature": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"encoding": 9}, grpc.StatusCode.INVALID_ARGUMENT, "encoding"),
        ({"model": "cats"}, grpc.StatusCode.NOT_FOUND, "model must be one of smoke"),
    ],
)
def test_errors_say_what_to_change(server: str, change: dict[str, object], code: grpc.StatusCode, words: str) -> None:
    request = wire.SampleRequest(range=wire.Range(**{"count": 1, **change}))  # type: ignore[arg-type]
    with grpc.insecure_channel(server) as channel, pytest.raises(grpc.RpcError) as error:
        rpc.SamplingServiceStub(channel).Sample(request, timeout=20)
    assert error.value.code() is code
    assert words in error.value.details()


def test_the_largest_sample_call_fits_a_client_with_grpcs_defaults(server: str) -> None:
    with Client(server) as client:
        model = client.model()
        assert len(model.sample(0, 0, model.batch)) == model.batch
    with grpc.insecure_channel(server) as channel:
        stub = rpc.SamplingServiceStub(channel)
        count = stub.GetModel(wire.GetModelRequest(), timeout=20).model.max_files
        for encoding in (wire.ENCODING_PNG, wire.ENCODING_JPEG, wire.ENCODING_WEBP):
            wanted = wire.Range(count=count, encoding=encoding, temperature=100)
            assert len(stub.Sample(wire.SampleRequest(range=wanted), timeout=60).chunk.files) == count
            wanted.count += 1
            with pytest.raises(grpc.RpcError, match=f"count must be {count} or less"):
                stub.Sample(wire.SampleRequest(range=wanted), timeout=60)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("side", [16, 64, 200])
def test_no_picture_takes_more_bytes_as_a_file_than_a_message_allows_for(kind: str, side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    assert len(encode(noise, kind)) <= noise.size * 5 // 4 + FILE_BYTES


def test_health_by_service(server: str) -> None:
    with grpc.insecure_channel(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "balancedvae.sampling.v1.SamplingService"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
    check = [BIN / "python", "-m", "serve.healthcheck"]
    assert subprocess.run([*check, server]).returncode == 0
    assert subprocess.run([*check, "127.0.0.1:1"], stderr=subprocess.PIPE).returncode == 1
    # Of a process: this one is no server, and that one is not there.
    assert_clear_error(
        command("python", "-m", "serve.healthcheck", "--pid", os.getpid()), "takes a serve-vae's process"
    )
    assert_clear_error(command("python", "-m", "serve.healthcheck", "--pid", 2**22), "cannot look at process 4194304")


@pytest.mark.parametrize(
    "words", [["sample-cli", "--out", "serve-vae"], *([name] for name in sorted({*HOMES} - {"serve-vae"}))]
)
def test_what_serves_nothing_is_healthy(words: list[str]) -> None:
    """A container's first process may be a long job; this one has its words, and waits for its input to end."""
    full = ["sh", "-c", "echo; read _", BIN / words[0], *words[1:]]
    with subprocess.Popen(full, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # a process that is just starting shows no words yet
        result = CliRunner().invoke(healthcheck, ["--pid", str(process.pid)])
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, "serves nothing" in line) == (0, True), line


def test_a_foreign_client_finds_its_way_by_reflection(server: str, smoke_bundle: Path) -> None:
    curl = [BIN / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect"]
    listed = subprocess.run([*curl, "--list-methods", f"http://{server}"], capture_output=True, text=True, check=True)
    assert "balancedvae.sampling.v1.SamplingService/SampleStream" in listed.stdout
    assert "grpc.health.v1.Health/Watch" in listed.stdout
    ask = json.dumps({"range": {"seed": 7, "start": 3, "count": 1, "encoding": "ENCODING_PNG"}})
    url = f"http://{server}/balancedvae.sampling.v1.SamplingService/Sample"
    reply = subprocess.run([*curl, "-d", ask, url], capture_output=True, text=True, check=True)
    chunk = wire.Chunk()
    from google.protobuf import json_format

    json_format.ParseDict(json.loads(reply.stdout)["chunk"], chunk)
    picture = np.asarray(Image.open(io.BytesIO(chunk.files[0])))
    assert np.array_equal(picture, Engine(load(smoke_bundle)).sample(7, 3, 1)[0])
    assert (chunk.start, chunk.count, chunk.seed, chunk.height, chunk.width) == (3, 1, 7, 16, 16)


def test_a_port_in_use_is_one_line(server: str, smoke_bundle: Path) -> None:
    result = command("serve-vae", "--model", smoke_bundle, "--listen", server)
    assert_clear_error(result, f"cannot listen on {server}", "in use")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_unix_socket_has_one_server(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ("--model", smoke_bundle, "--listen", f"unix:{tmp_path}/socket")
    with serving(*words) as (address, first), Client(address) as client:
        result = command("serve-vae", *words)
        assert_clear_error(result, f"cannot listen on {address}", "in use")
        assert len(client.model().sample(0, 0, 3)) == 3
        first.kill()  # what it leaves is in nobody's way
        first.wait(60)
        assert (tmp_path / "socket").is_socket()
        with serving(*words):
            assert len(client.model().sample(0, 0, 3)) == 3


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8470", "without http://"),
        ("127.0.0.1", "the port is missing"),
        ("127.0.0.1:port", "HOST:PORT or unix:PATH"),
        ("127.0.0.1:0", "HOST:PORT or unix:PATH"),
        ("", "HOST:PORT or unix:PATH"),
    ],
)
def test_what_is_no_address_is_said_to_be_none(address: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Client(address)
    for main, line in ((sample_cli, ["--server", address, "--n", "1", "--out", "out"]), (healthcheck, [address])):
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 2
        assert words in result.stderr.splitlines()[-1]
        assert f"Received: {address!r}" in result.stderr.splitlines()[-1]


def test_a_name_with_several_addresses_is_listened_to_on_all_or_none(server: str, smoke_bundle: Path) -> None:
    port = server.rpartition(":")[2]
    result = command("serve-vae", "--model", smoke_bundle, "--listen", f"localhost:{port}")
    assert_clear_error(result, f"cannot listen on localhost:{port}", "in use")
    with serving("--model", smoke_bundle, "--listen", "localhost:0") as (address, _), Client(address) as client:
        assert address.startswith("localhost:")
        assert len(client.model().sample(0, 0, 3)) == 3
    absent = command("serve-vae", "--model", smoke_bundle, "--listen", "no.such.host.invalid:0", "--insecure")
    assert_clear_error(absent, "no.such.host.invalid is not this machine's")


def test_no_server_there_says_what_to_try(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = command("sample-cli", "--server", address, "--wait", 0, "--n", 1, "--out", tmp_path / "out")
    assert_clear_error(result, f"no server answers at {address}", "serve-vae --listen")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sigterm_finishes_what_is_under_way(smoke_bundle: Path) -> None:
    with (
        serving("--model", smoke_bundle) as (address, process),
        Client(address, Options(patience=0)) as client,
    ):
        stream = client.model().stream(1, 0, 2000)
        parts = [next(stream)]
        process.send_signal(signal.SIGTERM)
        parts += list(stream)
        assert sum(len(images) for _, images in parts) == 2000
        process.wait(timeout=60)
        assert process.returncode == 0
        with pytest.raises(RemoteError, match="no server answers"):
            client.models()


@pytest.mark.parametrize("listen", ["8470", "127.0.0.1:70000", "127.0.0.1:", "0.0.0.0:8470", "[::]:8470"])
def test_addresses_that_are_refused(listen: str) -> None:
    assert_clear_error(command("serve-vae", "--listen", listen), code=2)


def test_two_files_of_one_model_and_version_are_refused(smoke_bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "smoke@1.onnx"
    again.write_bytes(smoke_bundle.read_bytes())
    result = command("serve-vae", "--model", smoke_bundle, "--model", again, "--listen", "127.0.0.1:0")
    assert_clear_error(result, "smoke.onnx and smoke@1.onnx are both the model smoke, version 1", "smoke@2.onnx")
