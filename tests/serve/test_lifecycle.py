"""Starting, health, draining, ending; limits, and what is said in the log."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from serve import AsyncClient, Client, Options
from serve.client.tries import Tries
from serve.errors import Overloaded, Unreachable
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, assert_clear_error, command, free_address, metrics, serving
from tests.serve.test_models import until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVICES = ("", "balancedvae.sampling.v1.SamplingService", "inference.GRPCInferenceService")


def test_health_is_watched_until_the_end(smoke_bundle: Path) -> None:
    with serving("--model", smoke_bundle) as (address, process), grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in (*SERVICES, *SERVICES)]
        for watch in watches:
            assert next(watch).status == SERVING
        watches.pop().cancel()  # one that leaves takes nobody along
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="cats"))
        assert next(unknown).status == UNKNOWN
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="cats"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        stream = rpc.SamplingServiceStub(channel).SampleStream(wire.SampleStreamRequest(range=wire.Range(count=5000)))
        got = next(stream).chunk.count
        process.send_signal(signal.SIGTERM)
        for watch in watches:
            assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            rpc.SamplingServiceStub(channel).Sample(wire.SampleRequest(range=wire.Range(count=1)), timeout=20)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert got + sum(reply.chunk.count for reply in stream) == 5000
        process.wait(timeout=20)  # the watchers, who never end, do not use up the grace of 30 s
        assert process.returncode == 0


def test_a_folder_without_models_is_not_ready_until_there_is_one(smoke_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    with serving("--models", folder, "--watch", 0.05) as (address, _), grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == NOT_SERVING
        stub = rpc.SamplingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.Sample(wire.SampleRequest(range=wire.Range(count=1)), timeout=20)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        with Client(address, Options(patience=0)) as client, pytest.raises(Unreachable, match="no model is ready yet"):
            client.model()

        async def ask() -> None:
            async with AsyncClient(address, Options(patience=0)) as client:
                await client.model()

        with pytest.raises(Unreachable, match="no model is ready yet"):
            asyncio.run(ask())
        (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
        assert next(watch).status == SERVING
        assert stub.Sample(wire.SampleRequest(range=wire.Range(count=1)), timeout=20).chunk.count == 1
        (folder / "smoke.onnx").unlink()
        assert next(watch).status == NOT_SERVING


def test_a_client_waits_for_a_server_that_starts_and_says_for_what(smoke_bundle: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    address = free_address()
    words = [BIN / "sample-cli", "--server", address, "--wait", "50", "--n", "3", "--out", out]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as client:
        assert client.stderr is not None
        assert client.stderr.readline() == f"no server answers at {address} yet; waiting for it, 50 s at most\n"
        with serving("--listen", address, "--models", folder, "--watch", 0.05):
            said = f"the server at {address} answered UNAVAILABLE: no model is ready yet; repeat in a moment; "
            assert client.stderr.readline() == f"{said}waiting for it, 60 s at most\n"
            (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
            assert client.wait(60) == 0, client.stderr.read()
    assert len(list(out.glob("*.png"))) == 3


def test_the_patience_for_loading_begins_when_a_server_answers(smoke_bundle: Path, tmp_path: Path) -> None:
    """However long it was waited for before."""
    folder = tmp_path / "models"
    folder.mkdir()
    address = free_address()
    with Client(address, Options(start=600, patience=60)) as client, futures.ThreadPoolExecutor(1) as pool:
        tries = Tries(client)
        tries._since -= 300
        found = pool.submit(client.model)
        with serving("--listen", address, "--models", folder, "--watch", 0.05):
            with pytest.raises(grpc.RpcError) as error:
                client.stub.GetModel(wire.GetModelRequest(), timeout=20, wait_for_ready=True)
            with tries:
                raise error.value
            assert tries.pause > 0
            (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
            assert found.result(60).name == "smoke"


def test_a_server_that_restarts_while_it_loads_is_waited_for(smoke_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    address = free_address()
    with Client(address) as client, futures.ThreadPoolExecutor(1) as pool:
        with serving("--listen", address, "--models", folder, "--watch", 0.05) as (_, first):
            found = pool.submit(client.model)
            until(lambda: client.met)
            first.kill()
            first.wait(60)
        with serving("--listen", address, "--model", smoke_bundle):
            assert found.result(60).name == "smoke"


def test_a_name_of_several_servers_is_waited_for_while_they_load(smoke_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    with serving("--models", folder, "--watch", 0.05) as (address, _):
        name = f"ipv4:{address}"
        with (
            Client(name, Options(patience=0)) as client,
            pytest.raises(Unreachable, match=f"no server at {name} says that it serves"),
        ):
            client.model()
        with Client(name) as client, futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(client.model)
            (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
            assert found.result(60).name == "smoke"


def test_a_signal_that_came_early_ends_what_is_waited_for() -> None:
    program = """
import os, signal, threading
from serve.stop import StopRequest
stop, woken = StopRequest(), threading.Event()
os.kill(os.getpid(), signal.SIGTERM)
stop.wake_by(woken.set)
print(woken.wait(60))
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True\n"


def test_a_second_signal_ends_it_now(smoke_bundle: Path) -> None:
    with serving("--model", smoke_bundle, "--grace", 600) as (address, process), Client(address) as client:
        stream = client.model().stream(0, 0, 2**40)
        next(stream)
        process.send_signal(signal.SIGTERM)
        next(stream)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert process.returncode == 0


def test_the_grace_is_the_longest_that_a_stream_may_take(smoke_bundle: Path) -> None:
    with (
        serving("--model", smoke_bundle, "--grace", 0.5) as (address, process),
        grpc.insecure_channel(address) as channel,
    ):
        request = wire.SampleStreamRequest(range=wire.Range(count=2**40))
        stream = rpc.SamplingServiceStub(channel).SampleStream(request)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as error:
            list(stream)
        assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        process.wait(timeout=60)
        assert process.returncode == 0


def test_over_the_limit_is_resource_exhausted_with_retry_info(smoke_bundle: Path) -> None:
    with (
        serving("--model", smoke_bundle, "--queue-samples", 6000) as (address, _),
        grpc.insecure_channel(address) as channel,
        Client(address, Options(patience=0)) as impatient,
    ):
        stub = rpc.SamplingServiceStub(channel)
        model = impatient.model()
        request = wire.SampleStreamRequest(range=wire.Range(count=10**9))
        streams, refusal = [], None
        while refusal is None:
            streams.append(stub.SampleStream(request))
            try:
                next(streams[-1])
            except grpc.RpcError as error:
                refusal = error
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the server is full" in refusal.details()
        info = RetryInfo()
        assert rpc_status.from_call(refusal).details[0].Unpack(info)
        assert 0 < info.retry_delay.ToTimedelta().total_seconds() <= 30
        assert "grpc-retry-pushback-ms" in dict(refusal.trailing_metadata())
        with pytest.raises(Overloaded):
            model.sample(0, 0, model.batch)
        for each in streams:
            each.cancel()
        with Client(address) as patient:
            assert len(patient.model().sample(0, 0, 5)) == 5


def test_a_deadline_that_cannot_be_met(server: str) -> None:
    request = wire.SampleRequest(range=wire.Range(count=1000))
    with grpc.insecure_channel(server) as channel, pytest.raises(grpc.RpcError) as error:
        rpc.SamplingServiceStub(channel).Sample(request, timeout=0.0001)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_metrics_count_what_happened(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving("--model", smoke_bundle, "--metrics", "127.0.0.1:0", log=log) as (address, _):
        with Client(address) as client:
            model = client.model()
            model.sample(0, 0, 10)
            list(model.files(0, 0, 20, encoding="webp"))
            with pytest.raises(grpc.RpcError, match="count must be 1 or more"):
                client.stub.Sample(wire.SampleRequest())
        (url,) = re.findall(r"http://\S+(?=/metrics)", log.read_text())
        for path in ("/", "/metrics/", "/favicon.ico", "/debug"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + path, timeout=20)
        lines = [line for line in metrics(log).splitlines() if not line.startswith("#")]
        found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        service = 'method="/balancedvae.sampling.v1.SamplingService'
        assert found[f'balancedvae_requests_total{{code="OK",{service}/Sample"}}'] == 1
        assert found[f'balancedvae_requests_total{{code="INVALID_ARGUMENT",{service}/Sample"}}'] == 1
        assert found[f'balancedvae_request_seconds_count{{{service}/SampleStream"}}'] == 1
        assert found['balancedvae_samples_total{model="smoke"}'] == 30
        assert found['balancedvae_batch_samples_sum{model="smoke"}'] == 30
        assert found['balancedvae_encode_seconds_count{encoding="webp"}'] == 1
        assert found['balancedvae_model_loads_total{result="loaded"}'] == 1
        assert found['balancedvae_queue_samples{model="smoke",version="1"}'] == 0
        assert (found["balancedvae_held_samples"], found["balancedvae_requests_under_way"]) == (0, 0)
        info = [name for name in found if name.startswith("balancedvae_model_info")]
        assert model.digest in info[0]


def test_the_log_is_json_with_request_ids(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        serving("--model", smoke_bundle, "--log-format", "json", "--log-requests", log=log) as (address, _),
        grpc.insecure_channel(address) as channel,
    ):
        stub = rpc.SamplingServiceStub(channel)
        request = wire.SampleRequest(range=wire.Range(count=1, temperature=-1))
        with pytest.raises(grpc.RpcError) as error:
            stub.Sample(request, metadata=[("x-request-id", "order-66")], timeout=20)
        assert dict(error.value.trailing_metadata())["x-request-id"] == "order-66"
        with pytest.raises(grpc.RpcError) as error:
            stub.Sample(request, metadata=[("x-request-id", 'a "quoted" one')], timeout=20)
        other = dict(error.value.trailing_metadata())["x-request-id"]
        assert len(other) == 32
    records = [json.loads(line) for line in log.read_text().splitlines()]
    ended = [record for record in records if record.get("code")]
    assert [record["request_id"] for record in ended] == ["order-66", other]
    assert ended[0]["method"].endswith("/Sample")
    assert ended[0]["code"] == "INVALID_ARGUMENT"
    assert ended[0]["seconds"] >= 0


def test_traces_go_to_a_collector(smoke_bundle: Path) -> None:
    found: queue.Queue[str] = queue.Queue()

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: object, context: object) -> object:  # noqa: N802 (gRPC's name)
            for resource in request.resource_spans:  # type: ignore[attr-defined]
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.put(f"{span.name} {span.trace_id.hex()}")
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serving("--model", smoke_bundle, "--otel", **where) as (address, _), Client(address) as client:
        assert len(list(client.model().stream(0, 0, 1))) == 1
        trace = "0af7651916cd43dd8448eb211c80319c"
        with grpc.insecure_channel(address) as channel:
            context = [("traceparent", f"00-{trace}-b7ad6b7169203331-01")]
            rpc.SamplingServiceStub(channel).ListModels(wire.ListModelsRequest(), metadata=context, timeout=20)
        names = [found.get(timeout=60) for _ in range(3)]
        assert any(name.startswith("balancedvae.sampling.v1.SamplingService/SampleStream ") for name in names)
        assert f"balancedvae.sampling.v1.SamplingService/ListModels {trace}" in names
    collector.stop(None)


def test_check_says_whether_it_would_start(smoke_bundle: Path, tmp_path: Path) -> None:
    good = command("serve-vae", "--model", smoke_bundle, "--check")
    assert good.returncode == 0
    assert good.stdout.splitlines()[0].startswith("smoke version 1: fp32, sha256 ")
    bad = tmp_path / "bad.onnx"
    bad.write_text("this is no model")
    assert_clear_error(command("serve-vae", "--model", bad, "--check"), "not an ONNX file")
    small = command("serve-vae", "--model", smoke_bundle, "--queue-samples", 1, "--check")
    assert_clear_error(small, "--queue-samples 1 is too small: one stream", "pass --queue-samples")
    from_environment = command("serve-vae", "--check", SERVE_VAE_MODEL=str(bad))
    assert_clear_error(from_environment, "not an ONNX file")


def test_a_slow_reader_of_a_million_costs_little_memory(smoke_bundle: Path) -> None:
    def resident(pid: int) -> int:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) << 10

    with serving("--model", smoke_bundle) as (address, process), grpc.insecure_channel(address) as channel:
        stub = rpc.SamplingServiceStub(channel)
        stub.Sample(wire.SampleRequest(range=wire.Range(count=500)), timeout=60)
        idle = resident(process.pid)
        streams = [
            stub.SampleStream(wire.SampleStreamRequest(range=wire.Range(seed=seed, count=10**6))) for seed in range(4)
        ]
        for stream in streams:
            next(stream)
        # While these read nothing, others are served, and the server has had every chance to run ahead.
        with Client(address) as client:
            for _ in range(20):
                assert len(client.model().sample(0, 0, 500)) == 500
        assert resident(process.pid) - idle < 200 * 2**20
        for stream in streams:
            stream.cancel()


def test_many_encodings_of_one_picture(server: str) -> None:
    import io

    from PIL import Image

    with Client(server) as client:
        model = client.model()
        raw = model.sample(7, 100, 40)
        for encoding, apart in (("png", 0), ("webp", 0), ("jpeg", 25)):
            files = dict(model.files(7, 100, 40, encoding=encoding))  # type: ignore[arg-type]
            assert list(files) == list(range(100, 140))
            for index, data in files.items():
                picture = Image.open(io.BytesIO(data))
                assert picture.format == encoding.upper()
                difference = np.abs(np.asarray(picture).astype(int) - raw[index - 100])
                assert difference.mean() <= apart


def test_requests_at_a_time_are_bounded(smoke_bundle: Path) -> None:
    with (
        serving("--model", smoke_bundle, "--max-requests", 3) as (address, _),
        grpc.insecure_channel(address) as channel,
    ):
        stub = rpc.SamplingServiceStub(channel)
        streams = [stub.SampleStream(wire.SampleStreamRequest(range=wire.Range(count=10**9))) for _ in range(3)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError) as error:
            stub.Sample(wire.SampleRequest(range=wire.Range(count=1)), timeout=20)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in streams:
            stream.cancel()


def test_threads_share_one_client(server: str) -> None:
    with Client(server) as client:
        model = client.model()
        same = model.sample(0, 0, 64)
        with futures.ThreadPoolExecutor(16) as pool:
            for images in pool.map(lambda _: model.sample(0, 0, 64), range(16)):
                np.testing.assert_array_equal(images, same)
