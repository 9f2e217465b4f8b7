"""Several servers make one range: whatever becomes of any of them, the samples are the same."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Any_
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from serve import Client, Engine, Fleet, Options, load
from serve.card import Card
from serve.client import pieces
from serve.client.pieces import Range, Work
from serve.errors import Broken, Changed, Closed, Rejected, Unreachable
from serve.model import Images
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, assert_clear_error, command, inside, serving
from tests.serve.test_models import until

COUNT = 30_000
SHAPE = (16, 16, 3)  # of the pictures of recipe smoke


@pytest.fixture(scope="module")
def wanted(smoke_bundle: Path) -> Images:
    return Engine(load(smoke_bundle)).sample(7, 0, COUNT)


@pytest.fixture
def three(smoke_bundle: Path) -> Iterator[list[tuple[str, Any]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving("--model", smoke_bundle, "--max-batch", 4)) for _ in range(3)]


def assert_the_same(parts: list[tuple[int, Images]], wanted: Images) -> None:
    assert [at for at, _ in parts] == list(np.cumsum([0, *(len(images) for _, images in parts)])[:-1])
    np.testing.assert_array_equal(np.concatenate([images for _, images in parts]), wanted)


def test_all_servers_share_a_range(three: list[tuple[str, Any]], wanted: Images) -> None:
    with Fleet([address for address, _ in three]) as fleet:
        model = fleet.model("smoke")
        assert_the_same(list(model.stream(7, 0, COUNT)), wanted)
        np.testing.assert_array_equal(model.sample(7, 5, 3), wanted[5:8])
        assert model.sample(7, 5, 0).shape == (0, 16, 16, 3)
        assert len(model.pictures(7, 0, 2)) == 2
        with pytest.raises(Rejected, match="count must be"):
            model.sample(7, 0, -1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_server_that_is_lost_changes_nothing(number: int, three: list[tuple[str, Any]], wanted: Images) -> None:
    """It dies, or drains, or hangs."""
    with Fleet([address for address, _ in three], Options(timeout=10)) as fleet:
        stream = fleet.model().stream(7, 0, COUNT)
        parts = [next(stream)]
        three[0][1].send_signal(number)
        try:
            assert_the_same([*parts, *stream], wanted)
        finally:
            three[0][1].send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("count", "side", "expected"), [(10, 64, 64), (1000, 64, 167), (10**6, 64, 1024), (10**6, 256, 85)]
)
def test_pieces_are_small_enough_for_all_servers_and_for_memory(count: int, side: int, expected: int) -> None:
    model: Any = SimpleNamespace(card=SimpleNamespace(image_shape=(side, side, 3)))
    fleet: Any = SimpleNamespace(clients=[None] * 3)
    assert Work(model, fleet, Range(0, 0, count, 1.0))._size == expected


def test_a_server_that_is_away_at_first_is_done_without(smoke_bundle: Path, wanted: Images) -> None:
    with serving("--model", smoke_bundle) as (address, _), Fleet(["127.0.0.1:1", address]) as fleet:
        assert_the_same(list(fleet.model().stream(7, 0, 3000)), wanted[:3000])


def test_servers_that_load_are_waited_for(smoke_bundle: Path, tmp_path: Path, wanted: Images) -> None:
    folder, out = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    with ExitStack() as stack:
        one, two = (stack.enter_context(serving("--models", folder, "--watch", 0.05))[0] for _ in range(2))
        with Fleet([one, two], Options(patience=0)) as fleet, pytest.raises(Unreachable, match="no model is ready yet"):
            fleet.model()
        words: list[str | Path] = [
            BIN / "sample-cli",
            "--server",
            f"{one},{two}",
            "--n",
            "300",
            "--seed",
            "7",
            "--format",
            "npy",
        ]
        with subprocess.Popen([*words, "--out", out], stderr=subprocess.PIPE, text=True) as client:
            assert client.stderr is not None
            assert "no model is ready yet; repeat in a moment; waiting for it" in client.stderr.readline()
            (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
            assert client.wait(60) == 0, client.stderr.read()
    found = [np.load(path) for path in sorted(out.glob("*.npy"))]
    np.testing.assert_array_equal(np.concatenate(found), wanted[:300])


class Scripted(rpc.SamplingServiceServicer):
    """A server of grey pictures, each as bright as its index says, that does to a request first what it is told to."""

    def __init__(self, card: str, first: Callable[[grpc.ServicerContext], object] = lambda context: None) -> None:
        self.card, self.first = card, first
        self.asked: list[int] = []
        self.ready, self.lacks = True, False

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> wire.GetModelResponse:  # noqa: N802
        if not self.ready:
            busy(context, grpc.StatusCode.UNAVAILABLE)
        if self.lacks:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return wire.GetModelResponse(
            model=wire.Model(name="m", version="1", digest="d", card=self.card, max_count=4096)
        )

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> wire.ListModelsResponse:  # noqa: N802
        return wire.ListModelsResponse()

    def Sample(self, request: wire.SampleRequest, context: grpc.ServicerContext) -> wire.SampleResponse:  # noqa: N802
        wanted = request.range
        self.asked.append(wanted.start)
        self.first(context)
        pixels = np.repeat(np.arange(wanted.start, wanted.start + wanted.count) % 256, SHAPE[0] * SHAPE[1] * SHAPE[2])
        return wire.SampleResponse(chunk=chunk(wanted.start, wanted.count, pixels))

    def Decode(self, request: wire.DecodeRequest, context: grpc.ServicerContext) -> wire.DecodeResponse:  # noqa: N802
        self.first(context)
        return wire.DecodeResponse(chunk=chunk(0, 1, np.zeros(SHAPE)))


def chunk(start: int, count: int, pixels: Any) -> wire.Chunk:
    height, width, channels = SHAPE
    return wire.Chunk(
        start=start,
        count=count,
        height=height,
        width=width,
        channels=channels,
        digest="d",
        pixels=pixels.astype(np.uint8).tobytes(),
    )


def busy(context: grpc.ServicerContext, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED) -> None:
    """Answer as a server does that can do it in a moment."""
    delay = Any_()
    delay.Pack(RetryInfo(retry_delay=Duration(nanos=10**7)))
    context.abort_with_status(rpc_status.to_status(Status(code=code.value[0], message="full", details=[delay])))


@pytest.fixture
def card(smoke_bundle: Path) -> str:
    return load(smoke_bundle).card.to_json()


@contextmanager
def scripted(*servers: Scripted) -> Iterator[list[str]]:
    with ExitStack() as stack:
        addresses = []
        for each in servers:
            server = grpc.server(ThreadPoolExecutor(4))
            rpc.add_SamplingServiceServicer_to_server(each, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            server.start()
            stack.callback(lambda server=server: server.stop(0).wait())
        yield addresses


def indices(images: Images) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]


def test_one_server_that_is_away_ends_nothing_however_impatient(card: str, caplog: pytest.LogCaptureFixture) -> None:
    """And it is told of once, in however many streams."""
    slow = Scripted(card, lambda context: threading.Event().wait(0.7))
    with scripted(slow) as (address,), Fleet(["127.0.0.1:1", address], Options(patience=0)) as fleet:
        model = fleet.model()
        for start in (0, 100):
            assert indices(model.sample(0, start, 150)) == list(range(start, start + 150))
    (line,) = [line for line in caplog.messages if "without" in line]
    assert line.startswith("beginning without 127.0.0.1:1: no server answers")


def test_a_server_that_hangs_is_passed_over_for_few_samples_too(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "UNKNOWN", 0.2)
    over = threading.Event()
    hung = Scripted(card, lambda context: over.wait(60))
    with scripted(hung, Scripted(card)) as addresses, Fleet(addresses) as fleet:
        model = fleet.model()
        for start in range(0, 50, 5):
            assert indices(model.sample(0, start, 5)) == list(range(start, start + 5))
        assert len(hung.asked) <= 1  # it is at that one still
        over.set()


def test_two_streams_share_the_servers(card: str) -> None:
    slow = [Scripted(card, lambda context: threading.Event().wait(0.02)) for _ in range(2)]
    with scripted(*slow) as addresses, Fleet(addresses) as fleet, ThreadPoolExecutor(1) as pool:
        model = fleet.model()
        began = threading.Event()

        def read() -> int:
            return sum(len(images) for at, images in model.stream(0, 0, 64_000) if at == 0 or began.set() is None)

        long = pool.submit(read)
        assert began.wait(60)
        for start in (7, 8):
            assert indices(model.sample(0, start, 2)) == [start, start + 1]
        assert not long.done()
        fleet.close()
        assert isinstance(long.exception(), Closed)


def test_servers_that_hang_or_are_lost_one_after_the_other_are_all_of_them(
    card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "UNKNOWN", 0.2)
    over, lost = threading.Event(), threading.Event()
    hung = Scripted(card, lambda context: over.wait(60))
    other = Scripted(
        card, lambda context: lost.is_set() and context.abort(grpc.StatusCode.INTERNAL, "the device is lost")
    )
    with scripted(hung, other) as addresses, Fleet(addresses, Options(patience=0.5)) as fleet:
        model = fleet.model()
        assert indices(model.sample(0, 0, 200)) == list(range(200))
        assert hung.asked
        lost.set()
        with pytest.raises(Broken, match="the device is lost"):
            model.sample(0, 0, 200)
        lost.clear()
        assert model.decode(np.zeros((1, load_size(card)), np.float32)).shape == (1, *SHAPE)  # not by the first
        over.set()


def test_a_server_that_comes_back_with_another_model_is_no_wrong_argument(card: str) -> None:
    away, other = Scripted(card), Scripted(card, lambda context: threading.Event().wait(0.1))
    away.ready = False
    with scripted(away, other) as addresses, Fleet(addresses) as fleet:
        model = fleet.model()
        away.ready = away.lacks = True
        with pytest.raises(Changed, match="changed the model m meanwhile"):
            model.sample(0, 0, 20_000)


def test_a_server_that_hangs_does_not_keep_from_the_model(card: str) -> None:
    over = threading.Event()
    hung = Scripted(card)
    hung.GetModel = lambda request, context: over.wait(60)  # type: ignore[method-assign, assignment, return-value]
    with scripted(hung, Scripted(card)) as addresses, Fleet(addresses, Options(timeout=600)) as fleet:
        assert indices(fleet.model().sample(0, 7, 3)) == [7, 8, 9]
        over.set()


def test_a_server_that_comes_back_may_be_loading_still(card: str) -> None:
    """Its model is still to come, so that the stream goes on without it, and then with it."""
    loading = Scripted(card)
    loading.ready = False

    def one(context: grpc.ServicerContext) -> None:
        loading.ready = True
        until(lambda: bool(loading.asked))

    with scripted(loading, Scripted(card)) as addresses, Fleet(addresses) as fleet:
        model = fleet.model()
        assert indices(model.sample(0, 0, 100)) == list(range(100))
    loading.ready = False
    with scripted(loading, Scripted(card, one)) as addresses, Fleet(addresses) as fleet:
        assert indices(fleet.model().sample(0, 0, 256)) == list(range(256))
        assert loading.asked


def test_servers_that_are_full_for_a_moment_decode_later(card: str) -> None:
    turns = iter(range(100))
    full = [Scripted(card, lambda context: busy(context) if next(turns) < 3 else None) for _ in range(2)]
    with scripted(*full) as addresses, Fleet(addresses) as fleet:
        assert fleet.model().decode(np.zeros((1, load_size(card)), np.float32)).shape == (1, *SHAPE)


def load_size(card: str) -> int:
    return Card.from_json(card).noise_size


def test_a_fleet_has_a_server(card: str) -> None:
    with pytest.raises(Rejected, match="one server or more"):
        Fleet([])


def test_what_no_waiting_mends_is_not_waited_for(server: str) -> None:
    with Fleet([server, server], Options(start=600)) as fleet, pytest.raises(Rejected, match="no model 'cats'"):
        fleet.model("cats")
    with pytest.raises(Rejected, match="a token is letters"):
        Fleet([server], Options(token="one\r"))


def test_where_all_are_lost_it_says_so(smoke_bundle: Path) -> None:
    with ExitStack() as stack:
        (one, first), (two, second) = (stack.enter_context(serving("--model", smoke_bundle)) for _ in range(2))
        stream = stack.enter_context(Fleet([one, two], Options(patience=1))).model().stream(7, 0, 1_000_000)
        next(stream)
        for process in (first, second):
            process.kill()
        with pytest.raises(Unreachable):
            list(stream)
    with pytest.raises(Unreachable), Fleet([one, two]) as fleet:
        fleet.model()


def test_servers_of_different_models_are_refused(smoke_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "smoke.onnx"
    assert inside("export-onnx", smoke_bundle, "--out", other, "--store", "float16").returncode == 0
    with serving("--model", smoke_bundle) as (one, _), serving("--model", other) as (two, _):
        with Fleet([one, two]) as fleet, pytest.raises(Changed, match="should have one digest of smoke"):
            fleet.model()
        result = command("sample-cli", "--server", f"{one},{two}", "--n", 5, "--out", tmp_path / "out")
        assert_clear_error(result, f"the servers {one} and {two} should have one digest")


def test_the_shell_names_several(three: list[tuple[str, Any]], wanted: Images, tmp_path: Path) -> None:
    addresses = ",".join(address for address, _ in three)
    words = ["--server", addresses, "--n", 3000, "--seed", 7, "--format", "npy", "--out", tmp_path / "out"]
    assert command("sample-cli", *words).returncode == 0
    found = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))]
    np.testing.assert_array_equal(np.concatenate(found), wanted[:3000])


def connected(port: int) -> bool:
    """Whether anybody has a connection to a port of this machine, as Linux tells it."""
    tables = (Path("/proc/net") / name for name in ("tcp", "tcp6"))  # gRPC maps IPv4 into IPv6
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(int(local.rpartition(":")[2], 16) == port and state == "01" for _, local, _, state, *_ in rows)


def test_all_addresses_of_a_name_are_used(three: list[tuple[str, Any]], wanted: Images) -> None:
    addresses = [address for address, _ in three]
    with Client(f"ipv4:{','.join(addresses)}") as client:
        model = client.model()
        for at in range(0, 100, 10):
            np.testing.assert_array_equal(model.sample(7, at, 10), wanted[at : at + 10])
        assert all(connected(int(address.rpartition(":")[2])) for address in addresses)
        three[0][1].kill()
        np.testing.assert_array_equal(model.sample(7, 0, 2000), wanted[:2000])
