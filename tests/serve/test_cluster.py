"""A job on a real Ray cluster of two nodes, which loses its driver and a node."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.bulk.cluster import LOOPBACK
from tests.conftest import BIN, assert_clear_error, command
from tests.serve.test_bulk import contents, sample

os.environ.setdefault(*LOOPBACK)  # before Ray is imported
ray = pytest.importorskip("ray")

COUNT, SHARD = 8_000, 50
WORDS = ["--format", "webdataset", "--shard", SHARD, "--device", "cpu"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing, and one node."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        assert started.address.startswith("127.0.0.1:")
        started.only = started.add_node(num_cpus=1)
        yield started
    finally:
        started.shutdown()


def until(process: subprocess.Popen[str], out: Path, files: int) -> None:
    while len(list(out.glob("*.tar"))) < files:
        assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_what_a_cluster_makes_is_what_one_machine_makes(cluster: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    """Though it loses the only node that works while another comes, and then the driver."""
    sample(smoke_bundle, tmp_path / "once", *WORDS, n=COUNT)
    out = tmp_path / "out"
    words = [BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", COUNT, *WORDS]
    full = [*map(str, words), "--ray", cluster.address]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(full, **pipes) as driver:
        until(driver, out, 20)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(cluster.only, allow_graceful=False)
        until(driver, out, len(list(out.glob("*.tar"))) + 20)
        driver.send_signal(signal.SIGKILL)
    assert len(list(out.glob("*.tar"))) < COUNT // SHARD
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    again = subprocess.run(full, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert " were there: " in again.stdout
    assert contents(out) == contents(tmp_path / "once")


def test_a_signal_ends_it_and_the_same_command_goes_on(cluster: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", COUNT, *WORDS, "--ray", cluster.address]
    with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True) as driver:
        until(driver, out, 5)
        driver.send_signal(signal.SIGTERM)
        assert driver.stderr is not None
        assert "the same command completes" in driver.stderr.read()
    assert driver.returncode == 128 + signal.SIGTERM


def test_local_is_this_machine_whatever_cluster_there_is(cluster: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--model", smoke_bundle, "--out", tmp_path / "out", "--n", 100, *WORDS, "--ray", "local"]
    result = command("sample-cli", *words, RAY_ADDRESS="127.0.0.1:1")
    assert result.returncode == 0, result.stderr


def test_a_shard_that_nobody_can_make_is_one_line(cluster: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--model", smoke_bundle, "--out", tmp_path / "out", *WORDS]
    assert command("sample-cli", *words, "--n", 2 * SHARD).returncode == 0
    second = sorted((tmp_path / "out").glob("*.tar"))[1]
    second.unlink()
    second.mkdir()
    result = command("sample-cli", *words, "--n", 3 * SHARD, "--ray", cluster.address)
    assert_clear_error(result, "Error: cannot write to", "the same command completes it")
    second.rmdir()
    result = command("sample-cli", *words, "--n", 3 * SHARD, "--ray", cluster.address)
    assert result.returncode == 0, result.stderr


def test_no_room_is_one_line(cluster: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--model", smoke_bundle, "--out", tmp_path / "out", "--n", 100, *WORDS[:-1], "cuda"]
    assert_clear_error(command("sample-cli", *words, "--ray", cluster.address), "the cluster has no GPU")


def test_no_cluster_is_one_line(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--model", smoke_bundle, "--out", tmp_path / "out", "--n", 100, *WORDS]
    result = command("sample-cli", *words, "--ray", "127.0.0.1:1")
    assert_clear_error(result, "no Ray cluster answers at 127.0.0.1:1")
    result = command("sample-cli", *words, "--ray", "ray://127.0.0.1:1")
    assert_clear_error(result, "--ray takes HOST:PORT, auto or local", "Received: ray://127.0.0.1:1")
    result = command("sample-cli", *words[:-1], "cuda:1", "--ray", "local")
    assert_clear_error(result, "pass --device cuda. Received: cuda:1")
