"""Devices that fail, and models that take long: nobody waits in vain, and health says so."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import helper

from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, serving, starting
from tests.serve.test_models import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


# A process of its own: the server's stubs of the Open Inference Protocol exclude tritonclient's.
SERVER = """
import asyncio, signal, sys
from pathlib import Path

from serve import Engine, load
from serve.server import telemetry
from serve.server.app import App
from serve.server.settings import Settings

class Fragile(Engine):
    def compute(self, noise):
        if fault.exists():
            if fault.read_text() == "once":
                fault.unlink()
            raise RuntimeError("the device has fallen off the bus")
        return super().compute(noise)

async def main():
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    kinds = [Fragile, *[Engine] * int(sys.argv[3])]
    opened = lambda bundle: [kind(bundle, "cpu", threads=1) for kind in kinds]
    app = App(Settings(listen="127.0.0.1:0", model=(bundle,)), opened)
    await app.start()
    await ended.wait()
    await app.stop(10)

bundle, fault = map(Path, sys.argv[1:3])
telemetry.log_to_stderr("text")
asyncio.run(main())
"""


class Fragile:
    """A server with a device that can be pulled out, and perhaps others that cannot."""

    def __init__(self, channel: grpc.Channel, fault: Path, log: Path) -> None:
        self.fault, self.log = fault, log
        self.sampling = rpc.SamplingServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self._ready = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelReady", request_serializer=bytes, response_deserializer=bytes
        )

    def sample(self) -> bytes:
        request = wire.SampleRequest(range=wire.Range(seed=7, count=5))
        return self.sampling.Sample(request, timeout=60).chunk.pixels

    def refused(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as error:
            self.sample()
        return error.value.code(), error.value.details()

    def ready(self) -> bool:
        return self._ready(b"\x0a\x05smoke", timeout=60) == b"\x08\x01"

    def status(self) -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(), timeout=60).status


@contextmanager
def fragile(bundle: Path, folder: Path, others: int = 0) -> Iterator[Fragile]:
    fault, log = folder / "fault", folder / "log"
    words = [BIN / "python", "-c", SERVER, bundle, fault, str(others)]
    with starting(words, log) as (address, _), grpc.insecure_channel(address) as channel:
        yield Fragile(channel, fault, log)


def test_a_device_that_fails_takes_the_server_out_until_it_works_again(smoke_bundle: Path, tmp_path: Path) -> None:
    with fragile(smoke_bundle, tmp_path) as server:
        wanted = server.sample()
        watch = server.health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        stream = server.sampling.SampleStream(wire.SampleStreamRequest(range=wire.Range(count=2**40)))
        next(stream)
        server.fault.write_text("always")
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert next(watch).status == NOT_SERVING
        code, text = server.refused()
        assert (code, "device fails" in text) == (grpc.StatusCode.UNAVAILABLE, True)
        assert not server.ready()
        server.fault.unlink()
        assert next(watch).status == SERVING
        assert server.ready()
        assert server.sample() == wanted
        assert server.log.read_text().count("a device fails") == 1
        assert server.log.read_text().count("works again") == 1


def test_one_batch_that_fails_is_one_error(smoke_bundle: Path, tmp_path: Path) -> None:
    with fragile(smoke_bundle, tmp_path) as server:
        wanted = server.sample()
        server.fault.write_text("once")
        code, text = server.refused()
        assert (code, "its log says why" in text) == (grpc.StatusCode.INTERNAL, True)
        assert server.sample() == wanted
        assert server.status() == SERVING
        assert "a device fails" not in server.log.read_text()


def test_of_two_devices_the_other_goes_on(smoke_bundle: Path, tmp_path: Path) -> None:
    with fragile(smoke_bundle, tmp_path, others=1) as server:
        wanted = server.sample()
        server.fault.write_text("always")
        failures = 0
        while "a device fails" not in server.log.read_text():
            try:
                same = server.sample() == wanted
            except grpc.RpcError:
                failures += 1
            else:
                assert same
        assert failures <= 1
        for _ in range(50):
            assert server.sample() == wanted
        assert server.status() == SERVING
        assert server.ready()


@pytest.fixture(scope="module")
def slow(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that ONNX Runtime works at for a minute or two before it is open: it multiplies out what is constant."""
    model = onnx.load(smoke_bundle)
    graph = model.graph
    side, times = 3000, 60
    for name, shape in (("column", [side, 1]), ("row", [1, side])):
        graph.initializer.append(onnx.numpy_helper.from_array(np.full(shape, 1e-2, np.float32), name))
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    nodes = [helper.make_node("MatMul", ["column", "row"], ["m0"])]
    nodes += [helper.make_node("MatMul", [f"m{at}", "m0"], [f"m{at + 1}"]) for at in range(times)]
    nodes += [
        helper.make_node("ReduceMean", [f"m{times}"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "nothing"], ["zero"]),
        helper.make_node("Add", ["noise", "zero"], ["noise too"]),
    ]
    for node in graph.node:
        node.input[:] = ["noise too" if each == "noise" else each for each in node.input]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_that_is_loading_ends_when_it_is_told(signals: int, slow: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [BIN / "serve-vae", "--model", slow, "--listen", "127.0.0.1:0", "--threads", "1"]
    with log.open("wb") as said, subprocess.Popen(words, stderr=said) as process:
        try:
            # The port answers, and the model is being opened.
            until(lambda: _cpu_seconds(process.pid) > 3)
            assert process.poll() is None, log.read_text()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
            assert process.returncode == 0, log.read_text()
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()
    assert "ready" not in log.read_text()


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_server_ends_while_another_model_is_being_loaded(slow: Path, smoke_bundle: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "models", tmp_path / "log"
    folder.mkdir()
    (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
    with serving("--models", folder, "--watch", 0.05, log=log) as (_, process):
        begun = _cpu_seconds(process.pid)
        (folder / "smoke@2.onnx").write_bytes(slow.read_bytes())
        until(lambda: _cpu_seconds(process.pid) > begun + 3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        assert process.returncode == 0
    assert "left a model that was still being loaded" in log.read_text()
    assert "Traceback" not in log.read_text()
