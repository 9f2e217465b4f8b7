"""Several servers make one range: whatever becomes of any of them, the samples are the same."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve import Client, Engine, Fleet, Options, load
from serve.client.fleet import Range, _Work
from serve.errors import Changed, Rejected, Unreachable
from serve.model import Images
from tests.conftest import BIN, assert_clear_error, command, inside, serving

COUNT = 30_000


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
    assert _Work(model, fleet, Range(0, 0, count, 1.0))._size == expected


def test_a_server_that_is_away_at_first_is_done_without(smoke_bundle: Path, wanted: Images) -> None:
    with serving("--model", smoke_bundle) as (address, _), Fleet(["127.0.0.1:1", address]) as fleet:
        assert_the_same(list(fleet.model().stream(7, 0, 3000)), wanted[:3000])


def test_servers_that_load_are_waited_for(smoke_bundle: Path, tmp_path: Path, wanted: Images) -> None:
    folder, out = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    with ExitStack() as stack:
        one, two = (stack.enter_context(serving("--models", folder, "--watch", 0.05))[0] for _ in range(2))
        with Fleet([one, two], Options(patience=0)) as fleet, pytest.raises(Unreachable, match="no model ready yet"):
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
            assert (
                client.stderr.readline()
                == "none of 2 servers can serve the model yet; waiting for them, 60 s at most\n"
            )
            (folder / "smoke.onnx").write_bytes(smoke_bundle.read_bytes())
            assert client.wait(60) == 0, client.stderr.read()
    found = [np.load(path) for path in sorted(out.glob("*.npy"))]
    np.testing.assert_array_equal(np.concatenate(found), wanted[:300])


def test_a_server_that_stays_away_is_told_of_once(
    smoke_bundle: Path, wanted: Images, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        (one, first), (two, _) = (stack.enter_context(serving("--model", smoke_bundle)) for _ in range(2))
        fleet = stack.enter_context(Fleet([one, two]))
        stream = fleet.model().stream(7, 0, COUNT)
        parts = [next(stream)]
        first.kill()
        assert_the_same([*parts, *stream], wanted)
    assert [line for line in caplog.messages if "going on without" in line][1:] == []


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
    assert threading.active_count() < 50


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
