"""What a server has to bear: bytes that mean nothing, connections that say nothing, clients that die."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import Client, Engine, load
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, metrics, serving
from tests.serve.test_models import until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = (
    "/balancedvae.sampling.v1.SamplingService/Sample",
    "/balancedvae.sampling.v1.SamplingService/SampleStream",
    "/balancedvae.sampling.v1.SamplingService/Decode",
    "/balancedvae.sampling.v1.SamplingService/GetModel",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/grpc.health.v1.Health/Check",
    "/cats.Cats/Meow",
)
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # a long stream that the fuzzer asked for by chance
}


class Victim:
    """A server, and what can be seen of it from outside."""

    def __init__(self, address: str, pid: int, log: Path, engine: Engine) -> None:
        self.address = address
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        self.pid = pid
        self.log = log
        self._engine = engine

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), 20)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10

    def metric(self, name: str) -> float:
        return float(next(line for line in metrics(self.log).splitlines() if line.startswith(name + " ")).split()[-1])

    def outlives(self, code: str) -> None:
        """It holds nothing any more of clients that are killed once they have said that they are reading."""
        clients = [subprocess.Popen([BIN / "python", "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"reading\n"
        assert self.metric("balancedvae_held_samples") > 0
        for client in clients:
            client.send_signal(signal.SIGKILL)
            client.communicate()
        until(lambda: self.metric("balancedvae_held_samples") == 0)

    def is_well(self) -> None:
        """It serves the right pictures, holds nothing, and its log has no traceback."""
        with Client(self.address) as client:
            assert np.array_equal(client.model().sample(7, 100, 50), self._engine.sample(7, 100, 50))
        until(lambda: self.metric("balancedvae_held_samples") == 0)
        until(lambda: self.metric("balancedvae_requests_under_way") == 0)
        assert "Traceback" not in self.log.read_text()
        assert "ERROR" not in self.log.read_text()


@pytest.fixture(scope="module")
def victim(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    log = tmp_path_factory.mktemp("victim") / "log"
    with serving("--model", smoke_bundle, "--metrics", "127.0.0.1:0", log=log) as (address, process):
        yield Victim(address, process.pid, log, Engine(load(smoke_bundle)))


def plain(value: bytes) -> bytes:
    return value


@given(method=st.sampled_from(METHODS), message=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_messages_of_random_bytes(channel: grpc.Channel, method: str, message: bytes) -> None:
    assert ask(channel, method, message) in EXPECTED


numbers = st.integers(0, 2**64 - 1) | st.integers(0, 100)
ranges = st.builds(
    wire.Range,
    model=st.text(max_size=20) | st.just("smoke") | st.just(""),
    seed=numbers,
    start=numbers,
    count=st.integers(0, 3000) | numbers,
    temperature=st.floats() | st.floats(0, 1),
    encoding=st.integers(0, 6),  # type: ignore[arg-type]
    version=st.text(max_size=70) | st.just(""),
    priority=st.integers(0, 4),  # type: ignore[arg-type]
)


@given(wanted=ranges)
@settings(max_examples=300, deadline=None)
def test_ranges_of_any_values(channel: grpc.Channel, wanted: wire.Range) -> None:
    assert ask(channel, METHODS[0], wire.SampleRequest(range=wanted).SerializeToString()) in EXPECTED


@given(
    wanted=st.builds(
        wire.DecodeRequest,
        model=st.just(""),
        noise=st.binary(max_size=200),
        encoding=st.integers(0, 6),  # type: ignore[arg-type]
    )
)
@settings(max_examples=200, deadline=None)
def test_noise_of_any_bytes(channel: grpc.Channel, wanted: wire.DecodeRequest) -> None:
    assert ask(channel, METHODS[2], wanted.SerializeToString()) in EXPECTED


def ask(channel: grpc.Channel, method: str, message: bytes) -> grpc.StatusCode:
    try:
        call = channel.unary_stream(method, request_serializer=plain, response_deserializer=plain)(message, timeout=5)
        for _, _ in zip(call, range(3), strict=False):
            pass
        call.cancel()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


@pytest.fixture(scope="module")
def channel(victim: Victim) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(victim.address) as channel:
        yield channel
    victim.is_well()


def test_random_bytes_on_the_port(victim: Victim) -> None:
    before = victim.files()
    chance = random.Random(0)
    for turn in range(300):
        with victim.connect() as connection:
            start = PREFACE if turn % 2 else b""
            connection.sendall(start + chance.randbytes(chance.randrange(2000)))
            if turn % 3 == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no goodbye
    victim.is_well()
    until(lambda: victim.files() <= before + 2)


def test_a_thousand_connections_that_say_nothing_or_little(victim: Victim) -> None:
    before_files, before_memory = victim.files(), victim.resident()
    silent = []
    for turn in range(1000):
        connection = victim.connect()
        if turn % 3 == 1:
            connection.sendall(PREFACE[: turn % len(PREFACE)])  # half a hello
        if turn % 3 == 2:
            connection.sendall(PREFACE + b"\0\0\0\4\0\0\0\0\0")  # a whole one, and then nothing
        silent.append(connection)
    victim.is_well()
    # The slow loris: a byte now and then.
    for _ in range(5):
        for connection in silent[:100]:
            with suppress(OSError):  # the server may have had enough of it
                connection.send(b"P")
        victim.is_well()
    for connection in silent:
        connection.close()
    until(lambda: victim.files() <= before_files + 2)
    assert victim.resident() - before_memory < 100 * 2**20
    victim.is_well()


def test_a_client_that_is_killed_leaves_nothing_behind(victim: Victim) -> None:
    code = f"""
from serve import Client
stream = Client({victim.address!r}).model().stream(1, 0, 2**40)
next(stream)
print("reading", flush=True)
for _ in stream:
    pass
"""
    victim.outlives(code)
    victim.is_well()


def test_many_calls_cancelled_at_any_time(victim: Victim) -> None:
    with grpc.insecure_channel(victim.address) as channel:
        stub = rpc.SamplingServiceStub(channel)
        chance = random.Random(1)

        def one() -> None:
            for _ in range(8):
                encoding = chance.choice([wire.ENCODING_RAW, wire.ENCODING_PNG])
                request = wire.SampleStreamRequest(range=wire.Range(count=10**6, encoding=encoding))
                stream = stub.SampleStream(request)
                for _ in range(chance.randrange(4)):
                    next(stream)
                stream.cancel()

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    victim.is_well()


@pytest.mark.parametrize("make", [lambda: b"x" * (5 << 20), lambda: b"x" * (64 << 20)])
def test_messages_that_are_too_large(victim: Victim, make: Callable[[], bytes]) -> None:
    with grpc.insecure_channel(victim.address, [("grpc.max_send_message_length", -1)]) as channel:
        assert ask(channel, METHODS[2], make()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    victim.is_well()
