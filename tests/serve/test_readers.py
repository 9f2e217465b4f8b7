"""What a server bears from callers who do half: they ask and do not read, begin to send and do not end."""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve import Client, Engine, Options, load
from serve.errors import Overloaded
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import metrics, serving
from tests.serve.test_models import until
from tests.serve.test_security import token

SAMPLE = "/balancedvae.sampling.v1.SamplingService/Sample"
DECODE = "/balancedvae.sampling.v1.SamplingService/Decode"
SERVING = health_pb2.HealthCheckResponse.SERVING
MIB = 2**20


def resident(process: subprocess.Popen[bytes]) -> int:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


def metric(log: Path, name: str, code: str = "") -> float:
    """A metric's value; of requests those of a code, of all methods."""
    begin = f'balancedvae_{name}{{code="{code}"' if code else f"balancedvae_{name} "
    return sum(float(line.split()[-1]) for line in metrics(log).splitlines() if line.startswith(begin))


class Half:
    """A connection that speaks HTTP/2 and does only what it is told: it reads nothing, and ends no message."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 20)
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.http.initiate_connection()
        self.http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self._left: dict[int, int] = {}
        self.flush()

    def begin(self, method: str, size: int) -> int:
        """Announce a message of so many bytes; give the stream's number."""
        stream = self.http.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"), ("te", "trailers")]
        self.http.send_headers(stream, [*headers, ("content-type", "application/grpc")])
        self.http.send_data(stream, b"\0" + size.to_bytes(4, "big"))
        self._left[stream] = size
        return stream

    def send(self, withheld: int) -> None:
        """Send of every message what the server takes, but not its last bytes; until it takes no more."""
        quiet = 0
        while quiet < 5:
            sent = 0
            for stream, left in list(self._left.items()):
                try:
                    room = min(self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size)
                    part = min(room, max(0, left - withheld))
                    if part:
                        self.http.send_data(stream, bytes(part))
                        self._left[stream] -= part
                        sent += part
                except h2.exceptions.ProtocolError:  # the server ended this one
                    del self._left[stream]
            self.flush()
            quiet = 0 if self.receive(0.1) or sent else quiet + 1

    def flush(self) -> None:
        self.socket.sendall(self.http.data_to_send())

    def receive(self, seconds: float) -> bool:
        readable, _, _ = select.select([self.socket], [], [], seconds)
        if readable:
            self.http.receive_data(self.socket.recv(MIB))
            self.flush()
        return bool(readable)


def unread(stack: ExitStack, address: str) -> grpc.Channel:
    """A connection of its own, whose calls read no more than they are told."""
    # gRPC would otherwise take more and more of a message beforehand, on a connection that turns out slow.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    channel = grpc.insecure_channel(address, options)
    return stack.enter_context(channel)


def ask(channel: grpc.Channel, **wanted: int) -> grpc.Call:
    """Ask for samples in one message, as a call whose reply is read when somebody wants it."""
    call = channel.unary_stream(SAMPLE, wire.SampleRequest.SerializeToString, wire.SampleResponse.FromString)
    return call(wire.SampleRequest(range=wire.Range(**wanted)))  # type: ignore[arg-type]


def pictures(call: Iterator[wire.SampleResponse]) -> int:
    """Read a reply; return how many pictures it has, none where it is a refusal."""
    try:
        return next(call).chunk.count
    except grpc.RpcError:
        return 0


def test_replies_that_nobody_reads_are_held_against_the_limits(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--metrics", "127.0.0.1:0", "--queue-samples", 100_000, "--queue-bytes", 32)
    with serving(*words, log=log) as (address, process), ExitStack() as stack, Client(address) as client:
        most = client.model().batch
        before = resident(process)
        calls = [ask(unread(stack, address), seed=seed, count=most) for seed in range(100)]
        fit = 32 * MIB // (most * 768)
        until(lambda: metric(log, "requests_total", "RESOURCE_EXHAUSTED") == 100 - fit)
        until(lambda: f'samples_total{{model="smoke"}} {float(fit * most)}' in metrics(log))  # all are computed
        assert metric(log, "requests_under_way") == fit
        assert metric(log, "held_bytes") > 28 * MIB
        # A message is there twice while it is sent, as gRPC was given it and as gRPC keeps it, and an allocator keeps
        # some of what was freed. Without the limit, 100 replies would be there twice: over 800 MiB.
        assert resident(process) - before < 5 * 32 * MIB
        assert sum(map(pictures, calls)) == most * fit
        until(lambda: metric(log, "held_bytes") == 0)


def test_a_token_cannot_have_more_replies_unread_than_requests(smoke_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    single = token(file, "single", "requests = 1\n")
    with (
        serving("--model", smoke_bundle, "--tokens", file) as (address, _),
        ExitStack() as stack,
        Client(address, Options(token=single, patience=0)) as client,
    ):
        model = client.model()
        stub = rpc.SamplingServiceStub(unread(stack, address))
        request = wire.SampleRequest(range=wire.Range(count=model.batch))
        mine = [("authorization", f"Bearer {single}")]
        channel = unread(stack, address)
        call = channel.unary_stream(SAMPLE, wire.SampleRequest.SerializeToString, wire.SampleResponse.FromString)
        held = call(request, metadata=mine)
        held.initial_metadata()  # the reply is on its way
        with pytest.raises(Overloaded, match="requests at a time"):
            model.sample(0, 0, 1)
        assert next(held).chunk.count == model.batch
        assert list(held) == []
        assert stub.Sample(request, metadata=mine, timeout=60).chunk.count == model.batch


def test_readers_who_read_nothing_make_room_for_others(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--queue-samples", 16384, "--stall", 0.5, "--metrics", "127.0.0.1:0")
    with serving(*words, log=log) as (address, _), ExitStack() as stack, Client(address) as client:
        model = client.model()
        request = wire.SampleStreamRequest(range=wire.Range(count=2**40))
        silent = [rpc.SamplingServiceStub(unread(stack, address)).SampleStream(request) for _ in range(12)]
        for each in silent:
            each.initial_metadata()
        until(lambda: metric(log, "held_samples") > 16384 - model.batch)
        # Refused at first, and then let in: the client asks again as RetryInfo says.
        assert np.array_equal(model.sample(7, 100, model.batch), Engine(load(smoke_bundle)).sample(7, 100, model.batch))
        assert metric(log, "stalled_readers_total") > 0
        assert "which reads nothing while others wait" in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_reader_who_paused_for_too_long_goes_on_where_it_stopped(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--queue-samples", 6000, "--stall", 0.5, "--metrics", "127.0.0.1:0")
    with serving(*words, log=log) as (address, _), ExitStack() as stack:
        client = stack.enter_context(Client(address, Options(patience=5)))
        stream = client.model().stream(seed=3, start=0, count=60_000)
        parts = [next(stream)[1]]
        other = stack.enter_context(Client(address)).model()
        until(lambda: metric(log, "held_samples") > 0)
        while not metric(log, "stalled_readers_total"):
            other.sample(0, 0, other.batch)  # all there is room for, but for the reader
        parts += [images for _, images in stream]
        assert np.array_equal(np.concatenate(parts), Engine(load(smoke_bundle)).sample(3, 0, 60_000))


def test_a_reader_who_pauses_keeps_its_place_where_nobody_else_wants_it(smoke_bundle: Path) -> None:
    with serving("--model", smoke_bundle, "--stall", 0.1) as (address, _), ExitStack() as stack:
        stub = rpc.SamplingServiceStub(unread(stack, address))
        stream = stub.SampleStream(wire.SampleStreamRequest(range=wire.Range(seed=1, count=20_000)))
        got = next(stream).chunk.count
        with Client(address) as client:
            for _ in range(30):  # longer than the stall
                client.model().sample(0, 0, 500)
        assert got + sum(reply.chunk.count for reply in stream) == 20_000


def test_a_drain_waits_for_replies_that_are_not_read_yet(smoke_bundle: Path) -> None:
    with serving("--model", smoke_bundle, "--grace", 100) as (address, process), ExitStack() as stack:
        calls = [ask(unread(stack, address), seed=seed, count=5000) for seed in range(3)]
        for call in calls:
            call.initial_metadata()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        assert [pictures(call) for call in calls] == [5000] * 3
        assert [list(call) for call in calls] == [[]] * 3
        process.wait(timeout=60)  # as soon as all is read, and not when the grace is over
        assert process.returncode == 0


@pytest.mark.parametrize("tokens", [True, False])
def test_messages_that_do_not_end_take_little_memory(tokens: bool, smoke_bundle: Path, tmp_path: Path) -> None:
    file, log = tmp_path / "tokens.toml", tmp_path / "log"
    token(file, "alice")
    more = ("--tokens", file) if tokens else ()
    with serving("--model", smoke_bundle, "--metrics", "127.0.0.1:0", *more, log=log) as (address, process):
        before = resident(process)
        half = Half(address)
        for _ in range(100):
            half.begin(DECODE, 4 * MIB - 1024)
        half.send(withheld=1024)
        # Without a token nothing is read; else few messages that take long are, and those who send too many are told.
        most = 16 * MIB if tokens else 3 * 64 * MIB
        assert resident(process) - before < most
        code = "UNAUTHENTICATED" if tokens else "RESOURCE_EXHAUSTED"
        assert metric(log, "requests_total", code) >= 80
        half.socket.close()
        until(lambda: metric(log, "requests_under_way") == 0)
        assert "Traceback" not in log.read_text()


def test_watchers_of_health_are_bounded_and_keep_nobody_from_an_answer(smoke_bundle: Path) -> None:
    async def watch(address: str) -> None:
        async with AsyncExitStack() as stack:
            request, refusals = health_pb2.HealthCheckRequest(), []
            watches: list[Any] = []
            options = [("grpc.use_local_subchannel_pool", 1)]
            while not refusals:
                stub = health_pb2_grpc.HealthStub(
                    await stack.enter_async_context(grpc.aio.insecure_channel(address, options))
                )
                more = [stub.Watch(request) for _ in range(64)]
                watches += more
                for each in more:
                    try:
                        await each.read()
                    except grpc.RpcError as error:
                        refusals.append(error.code())
                assert len(watches) <= 1024 + 64
            assert refusals == [grpc.StatusCode.RESOURCE_EXHAUSTED] * (len(watches) - 1024)
            assert (await stub.Check(request, timeout=60)).status == SERVING
            for each in watches:
                each.cancel()

    with serving("--model", smoke_bundle) as (address, _):
        asyncio.run(watch(address))
        with Client(address) as client, grpc.insecure_channel(address) as channel:
            assert len(client.model().sample(0, 0, 3)) == 3
            until(lambda: _watched(health_pb2_grpc.HealthStub(channel)))


def _watched(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        return bool(next(stub.Watch(health_pb2.HealthCheckRequest())).status == SERVING)
    except grpc.RpcError:  # those who went are still being counted
        return False
