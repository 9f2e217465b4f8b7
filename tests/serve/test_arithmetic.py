"""OpenVINO, and exact or fast arithmetic: what is promised of samples, and that no job and no stream mixes two."""

from __future__ import annotations

import json
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from serve import openvino
from serve.bulk.job import make
from serve.bulk.run import complete, held
from serve.bulk.store import open_store
from serve.bundle import load
from serve.client import Client
from serve.devices import Device, fastest, providers
from serve.engine import MOST_DIFFERENCE, Engine
from serve.errors import Changed, EngineError, JobError
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import inside, metrics, serving, starting

# A process whose engines say that they compute in other numbers: not every processor has them.
OTHER = """
import asyncio, sys
from pathlib import Path

from serve import Engine
from serve.server import app, folder, telemetry
from serve.server.settings import Settings

class Other(Engine):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.arithmetic = "bfloat16"

folder.Engine = Other
telemetry.log_to_stderr("text")
asyncio.run(app.serve(Settings(listen=sys.argv[1], model=(Path(sys.argv[2]),))))
"""


@pytest.fixture(scope="module")
def fast() -> Engine:
    return Engine(load(), "openvino", arithmetic="fast")


def test_openvino_gives_the_cpus_pictures_to_one_grey_level(smoke_bundle: Path) -> None:
    for bundle, count in ((load(), 40), (load(smoke_bundle), 100)):
        ours, theirs = (Engine(bundle, device).sample(3, 0, count).astype(int) for device in ("cpu", "openvino"))
        assert np.abs(ours - theirs).max() <= 1


def test_openvino_may_be_called_by_many_threads(smoke_bundle: Path) -> None:
    engine = Engine(load(smoke_bundle), "openvino", threads=1)
    wanted = engine.sample(1, 0, 160)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: engine.sample(1, at, 5), range(0, 160, 5)))
    assert np.array_equal(np.concatenate(parts), wanted)
    assert engine.arithmetic == "exact"
    assert engine.difference is None


def test_fast_is_measured_or_says_that_it_is_exact(fast: Engine, caplog: pytest.LogCaptureFixture) -> None:
    exact = Engine(load(), "openvino").sample(0, 0, 16).astype(int)
    apart = np.abs(fast.sample(0, 0, 16) - exact)
    if openvino.has_bfloat16():
        assert fast.arithmetic == "bfloat16"
        assert fast.difference is not None
        assert fast.difference.mean == apart.mean()
        assert 0 < apart.mean() <= MOST_DIFFERENCE
    else:
        assert fast.arithmetic == "exact"
        assert apart.max() == 0
        with caplog.at_level(logging.WARNING):
            Engine(load(), "openvino", batch=1, arithmetic="fast")
        assert caplog.messages == ["this processor has no bfloat16, so fast arithmetic is exact here"]


def test_fast_arithmetic_that_is_too_far_off_is_refused(fast: Engine) -> None:
    with pytest.raises(EngineError, match=r"grey levels from exact on average, .* use exact arithmetic"):
        fast._compare(lambda noise: 255 - fast.compute(noise))


def test_arithmetic_is_exact_or_fast() -> None:
    with pytest.raises(EngineError, match=r"exact or fast\. Received: 'quick'"):
        Engine(load(), arithmetic="quick")  # type: ignore[arg-type]


def test_gpus_take_their_tensor_cores_only_where_they_are_asked_to(tmp_path: Path) -> None:
    assert fastest(Device("cuda", 1)) == fastest(Device("tensorrt")) == "float16"
    cuda = providers(Device("cuda"), [8], 64, tmp_path, arithmetic="float16")
    assert dict(cuda)["CUDAExecutionProvider"]["use_tf32"] == "1"
    tensorrt = dict(providers(Device("tensorrt"), [8], 64, tmp_path, arithmetic="float16"))
    assert tensorrt["TensorrtExecutionProvider"]["trt_fp16_enable"] == "True"


def test_a_folder_holds_one_arithmetic(smoke_bundle: Path, tmp_path: Path) -> None:
    engine = Engine(load(smoke_bundle))
    begun = make(engine.name, engine.digest, engine.arithmetic, count=4)
    other = make(engine.name, engine.digest, "bfloat16", count=8)
    store = open_store(str(tmp_path / "x"))
    with held(begun, store) as kept:
        assert complete(kept, engine, store).made == 4
    with (
        pytest.raises(JobError, match=r"\(arithmetic exact, not bfloat16\); choose another --out"),
        held(other, store),
    ):
        pass


def test_a_folder_of_before_there_was_a_choice_is_exact(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ("sample-cli", "--model", smoke_bundle, "--out", tmp_path / "x")
    assert inside(*words, "--n", 3).returncode == 0
    path = tmp_path / "x" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("arithmetic") == "exact"
    path.write_text(json.dumps(manifest))
    result = inside(*words, "--n", 5)
    assert result.returncode == 0, result.stderr
    assert "2 made" in result.stdout
    assert json.loads(path.read_text())["arithmetic"] == "exact"


def test_replies_and_metrics_name_the_arithmetic(smoke_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--model", smoke_bundle, "--metrics", "127.0.0.1:0", "--arithmetic", "exact")
    with serving(*words, log=log) as (address, _), grpc.insecure_channel(address) as channel:
        stub = rpc.SamplingServiceStub(channel)
        assert stub.GetModel(wire.GetModelRequest()).model.arithmetic == "exact"
        assert stub.Sample(wire.SampleRequest(range=wire.Range(count=1))).chunk.arithmetic == "exact"
        assert 'arithmetic="exact"' in next(line for line in metrics(log).splitlines() if "model_info{" in line)
    assert "fp32, exact, " in log.read_text()


def test_a_stream_does_not_go_on_in_another_arithmetic(smoke_bundle: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'socket'}"
    with (
        serving("--model", smoke_bundle, "--listen", address, "--max-batch", 8) as (_, first),
        Client(address) as client,
    ):
        stream = client.model().stream(1, 0, 10**7)
        next(stream)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with starting([sys.executable, "-c", OTHER, address, smoke_bundle]):
            with pytest.raises(Changed, match="computes smoke in bfloat16 arithmetic, where exact was begun with"):
                for _ in stream:
                    pass
            with Client(address) as anew:
                assert anew.model().arithmetic == "bfloat16"
