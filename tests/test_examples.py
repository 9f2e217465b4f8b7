"""The examples do what they say, and get the engine's pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from serve import Engine, load
from serve.noise import between, draw
from serve.server.models import Limits
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import BIN, last_line, serving

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOISE = ROOT / "serve" / "server" / "http" / "page" / "noise.mjs"
LAST_SEED = 2**64 - 1
LARGE_SEED = 12345678901234567891  # a float64 would round it

Node = Callable[..., list[str]]


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle))


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """The words that run a script of examples/node, from a copy with its packages installed."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if not program or not npm:
        pytest.skip("needs node and npm")
    root = tmp_path_factory.mktemp("checkout")
    copy, noise = root / "examples" / "node", root / NOISE.relative_to(ROOT)
    noise.parent.mkdir(parents=True)
    shutil.copy(NOISE, noise)
    shutil.copytree(EXAMPLES / "node", copy, ignore=shutil.ignore_patterns("node_modules"))
    install = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        result = subprocess.run(install, cwd=copy, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm ci did not end in two minutes")
    if result.returncode:
        # A registry that cannot be reached is no fault of the examples; a lock that contradicts package.json is.
        assert "EUSAGE" not in result.stderr, result.stderr
        pytest.skip(f"npm ci failed: {' '.join(re.findall('^npm error (.+)', result.stderr, re.MULTILINE)[:3])}")
    return lambda script, *words: [program, str(copy / script), *map(str, words)]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would who has the environment's commands on the path."""
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment())


def environment() -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PROTOS": str(ROOT / "protos"), "PYTHONWARNINGS": "ignore"}


def succeed(words: list[str]) -> str:
    result = run(words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def python(script: str, *words: object) -> list[str]:
    return [sys.executable, str(EXAMPLES / "python" / script), *map(str, words)]


def pictures(folder: Path, start: int, count: int) -> np.ndarray:
    """The folder's PNGs, which are all there and no more."""
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names == [f"{index:09d}.png" for index in range(start, start + count)]
    return np.stack([np.asarray(Image.open(folder / name, formats=["PNG"])) for name in names])


def test_python_samples_three_ways(server: str, engine: Engine, tmp_path: Path) -> None:
    succeed(python("sample.py", server, tmp_path, "--seed", 3, "--start", 40, "--count", 800))
    expected = engine.sample(3, 40, 800)
    assert np.array_equal(np.load(tmp_path / "first.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "samples.npy"), expected)
    assert np.array_equal(pictures(tmp_path, 40, 800), expected)


def test_asyncio_lays_out_a_row_a_seed(server: str, engine: Engine, tmp_path: Path) -> None:
    succeed(python("gallery_aio.py", server, tmp_path, 5, LAST_SEED, 1))
    sheet = np.asarray(Image.open(tmp_path / "gallery.png"))
    assert sheet.shape == (3 * 16, 8 * 16, 3)
    for row, seed in enumerate((5, LAST_SEED, 1)):
        for column, picture in enumerate(engine.sample(seed, 0, 8)):
            assert np.array_equal(sheet[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)], picture)


def test_tritons_client_by_noise_and_by_address(server: str, engine: Engine, tmp_path: Path) -> None:
    succeed(python("triton_client.py", server, tmp_path, "--model", "smoke"))
    noise = np.load(tmp_path / "noise.npy")
    assert noise.shape == (8, 8)
    assert len(np.unique(noise)) == noise.size
    assert np.array_equal(np.load(tmp_path / "by_noise.npy"), engine.decode(noise))
    assert np.array_equal(np.load(tmp_path / "by_address.npy"), engine.sample(LAST_SEED, 100, 5))


def test_the_shell_sees_all_and_gets_a_png(server: str, engine: Engine, tmp_path: Path) -> None:
    said = succeed([str(EXAMPLES / "curl.sh"), server, str(tmp_path / "out")])
    assert "balancedvae.sampling.v1.SamplingService/SampleStream" in said
    assert "inference.GRPCInferenceService\n" in said
    assert re.search(r'"status": *"SERVING"', said)
    assert re.search(r'"ready": *true', said)
    assert said.count(f'"{engine.digest}"') == 2, "ListModels and GetModel"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "sample.png")), engine.sample(7, 100, 1)[0])


@pytest.mark.parametrize("script", ["sample.py", "gallery_aio.py", "triton_client.py"])
def test_python_without_a_server_says_so_in_a_line(script: str, tmp_path: Path) -> None:
    with silent() as address:
        result = run(python(script, address, tmp_path))
    assert result.returncode == 1
    assert last_line(result).startswith("Error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_extractor_is_made_of_a_network_of_kerass(tmp_path: Path) -> None:
    from training.evaluation.extractors import OnnxExtractor

    file = tmp_path / "mobilenet.onnx"
    succeed([sys.executable, str(EXAMPLES / "extractor.py"), str(file), "--weights", "none"])
    extractor = OnnxExtractor(file, side=16)
    features = extractor(np.stack([np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)]))
    assert features.shape == (2, extractor.size) == (2, 1280)
    assert not np.array_equal(*features)


def test_javascript_makes_the_noise_of_the_contract(node: Node) -> None:
    """The document's own vectors, and a range against the reference."""
    text = (ROOT / "docs" / "noise.md").read_text()
    vectors = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([-. \d]+) \|$", text, re.MULTILINE)
    assert len(vectors) >= 7
    asked = [(seed, index, 1, int(size)) for seed, index, size, _ in vectors] + [("7", "12345678901234567", 9, 130)]
    module = NOISE.as_uri()
    code = f"""
        const {{ draw }} = await import({module!r});
        const made = {json.dumps(asked)}.map(([seed, start, ...rest]) => draw(BigInt(seed), BigInt(start), ...rest));
        console.log(JSON.stringify(made.map((noise) => Array.from(noise))));
    """
    *firsts, many = json.loads(succeed([node("infer.js")[0], "--input-type=module", "--eval", code]))
    for made, (_, _, size, values) in zip(firsts, vectors, strict=True):
        expected = np.array(values.split(), np.float32)
        assert len(made) == int(size)
        np.testing.assert_array_max_ulp(np.array(made[: len(expected)], np.float32), expected, 1)
    np.testing.assert_array_max_ulp(np.array(many, np.float32).reshape(9, 130), draw(7, 12345678901234567, 9, 130), 1)


def test_javascript_goes_the_contracts_way_between_two_samples(node: Node) -> None:
    pairs = [(draw(7, 1, 1, 65)[0], draw(7, 5, 1, 65)[0]), (draw(7, 1, 1, 4)[0], -draw(7, 1, 1, 4)[0])]
    pairs.append((np.zeros(3, np.float32), np.ones(3, np.float32)))
    asked = [[list(map(float, end)) for end in pair] for pair in pairs]
    code = f"""
        const {{ between }} = await import({NOISE.as_uri()!r});
        const made = {json.dumps(asked)}.map((ends) => between(...ends.map((end) => Float32Array.from(end)), 7));
        console.log(JSON.stringify(made.map((way) => Array.from(way))));
    """
    ways = json.loads(succeed([node("infer.js")[0], "--input-type=module", "--eval", code]))
    for way, (first, last) in zip(ways, pairs, strict=True):
        wanted = between(first, last, 7)
        np.testing.assert_allclose(np.array(way, np.float32).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seed", "start"), [(7, 100), (LARGE_SEED, 2**63 - 20)])
def test_javascript_infers_by_noise_and_by_address(
    server: str, engine: Engine, node: Node, tmp_path: Path, seed: int, start: int
) -> None:
    succeed(node("infer.js", server, tmp_path, "smoke", seed, start, 20))
    expected = engine.sample(seed, start, 20)
    by_noise, by_address, noise = (
        np.fromfile(tmp_path / f"{name}.bin", kind)
        for name, kind in (("by-noise", np.uint8), ("by-address", np.uint8), ("noise", np.float32))
    )
    assert np.array_equal(by_address.reshape(expected.shape), expected)
    assert np.array_equal(by_noise.reshape(expected.shape), engine.decode(noise.reshape(20, 8)))
    # Its logarithms and cosines may round otherwise in a float32's last bit: a grey level at most.
    assert np.abs(by_noise.reshape(expected.shape).astype(int) - expected).max() <= 1


def test_javascript_streams_pngs(server: str, engine: Engine, node: Node, tmp_path: Path) -> None:
    succeed(node("sample.js", server, tmp_path, LARGE_SEED, 40, 800))
    assert np.array_equal(pictures(tmp_path, 40, 800), engine.sample(LARGE_SEED, 40, 800))


def test_javascript_goes_on_where_the_connection_broke(server: str, engine: Engine, node: Node, tmp_path: Path) -> None:
    # More than the first of its messages, 672 pictures of at most 900 bytes, and less than all.
    with cutting(server, 700_000) as address:
        result = run(node("sample.js", address, tmp_path, 7, 100, 2500))
    assert result.returncode == 0, result.stderr
    went_on = re.findall(r"again from (\d+) in", result.stderr)
    assert went_on
    assert 100 < int(went_on[0]) < 2600, "it began anew, or the connection never broke"
    assert np.array_equal(pictures(tmp_path, 100, 2500), engine.sample(7, 100, 2500))


def test_javascript_comes_back_when_a_full_server_has_room(
    smoke_bundle: Path, engine: Engine, node: Node, tmp_path: Path
) -> None:
    limits = Limits.of(engine.batch, 16 * 16 * 3)
    room = limits.chunk * limits.ahead  # as much as a stream holds that nobody reads
    with serving("--model", smoke_bundle, "--queue-samples", room) as (address, _), grpc.insecure_channel(address) as c:
        stream = rpc.SamplingServiceStub(c).SampleStream(wire.SampleStreamRequest(range=wire.Range(count=10**9)))
        next(stream)
        words = node("sample.js", address, tmp_path, 7, 100, 20)
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stderr is not None
            refused = process.stderr.readline()
            assert "the server is full" in refused
            assert "again from 100 in" in refused
            stream.cancel()
            assert process.wait(timeout=60) == 0, process.stderr.read()
    assert np.array_equal(pictures(tmp_path, 100, 20), engine.sample(7, 100, 20))


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("sample.js", (7, 0, 0), "count must be 1 or more"),
        ("sample.js", (7, 2**63, 1), "2^63"),
        ("infer.js", ("cats",), "cats"),
    ],
)
def test_javascript_says_what_the_server_said(
    server: str, node: Node, tmp_path: Path, script: str, words: tuple[object, ...], expected: str
) -> None:
    result = run(node(script, server, tmp_path, *words))
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert expected in line


def test_the_packages_are_exact_and_come_from_whatever_registry_is_configured() -> None:
    package = json.loads((EXAMPLES / "node" / "package.json").read_text())
    lock = json.loads((EXAMPLES / "node" / "package-lock.json").read_text())
    wanted = package["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    installed = {path: entry for path, entry in lock["packages"].items() if path}
    assert {name: installed[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    for path, entry in installed.items():
        assert entry["integrity"].startswith("sha512-"), path
        assert "resolved" not in entry, path


@contextmanager
def silent() -> Iterator[str]:
    """An address where nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def cutting(server: str, after: int) -> Iterator[str]:
    """A way to a server whose first connection breaks after so many bytes from there; later ones hold."""
    host, _, port = server.rpartition(":")
    limits = iter([after])
    connections: list[socket.socket] = []

    def forward(source: socket.socket, to: socket.socket, most: float) -> None:
        with suppress(OSError):
            while most > 0 and (data := source.recv(16384)):
                to.sendall(data)
                most -= len(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                client, _ = listener.accept()
                upstream = socket.create_connection((host, int(port)), 20)
                connections.extend((client, upstream))
                most = next(limits, float("inf"))
                for ends in ((client, upstream, float("inf")), (upstream, client, most)):
                    threading.Thread(target=forward, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for each in connections:
                each.close()
