"""Other servers on the same bundle: noise in, pixels out, for benchmarks to compare with.

    pip download --no-deps nvidia-pytriton==0.7.0, unzip the wheel
    python -m venv lit && lit/bin/pip install litserve onnxruntime
    python benchmarks/peers.py --triton pytriton/tritonserver --litserve lit/bin/python

Each runs the bundle in ONNX Runtime's CPU provider, merges the requests of different clients, and listens on the
loopback only. The client draws the noise and sends it, as neither server knows seeds.

That build of Triton has the python backend only: the repository is what export-onnx writes, but for its backend and
the time that a request may wait. Its Python layer was made for NumPy 1: on NumPy 2 `as_numpy` and arrays given to
`Tensor` lose their strides and bytes without a word. DLPack passes the same memory without NumPy's C interface. It
needs NumPy 2: with NumPy 1.26 this build crashes on DLPack, and does not need it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Protocol

import click
import numpy as np
import tritonclient.grpc as inference  # type: ignore[import-untyped]  # it ships no types
from runtimes import running

from export.bundles.triton import LARGEST, PATIENCE, write_repository
from serve.bundle import DEFAULT, Bundle, load
from serve.card import Card
from serve.engine import Engine
from serve.model import Images
from serve.noise import Noise, draw

WAIT = 60_000_000  # microseconds that Triton may keep a request
CHECKED, THREADS = 64, 4  # samples compared, and clients that ask for them

# (seed, start, count) to images uint8 [count, height, width, channels], over a connection of its own.
Ask = Callable[[int, int, int], Images]

TRITON = """
import json

import numpy as np
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, arguments):
        path = arguments["model_repository"] + "/" + arguments["model_version"] + "/model.onnx"
        options = onnxruntime.SessionOptions()
        parameters = json.loads(arguments["model_config"])["parameters"]
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        noise = [np.from_dlpack(utils.get_input_tensor_by_name(each, "noise")) for each in requests]
        images = self.session.run(["images"], {"noise": np.concatenate(noise)})[0]
        parts = np.split(images, np.cumsum([len(each) for each in noise])[:-1])
        return [utils.InferenceResponse([utils.Tensor.from_dlpack("images", part)]) for part in parts]
"""

LITSERVE = """
import signal
import sys
from typing import Annotated

import litserve
import numpy as np
import onnxruntime
from fastapi import Body, Response

MODEL, THREADS, PORT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class Pictures(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
        self.size = self.session.get_inputs()[0].shape[1]

    def decode_request(self, request: Annotated[bytes, Body()]):
        return np.frombuffer(request, np.float32).reshape(-1, self.size)

    def batch(self, noise):
        return noise

    def predict(self, noise):
        images = self.session.run(["images"], {"noise": np.concatenate(noise)})[0]
        return np.split(images, np.cumsum([len(each) for each in noise])[:-1])

    def unbatch(self, images):
        return images

    def encode_response(self, images):
        return Response(images.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    # What it starts ends with it where it is interrupted, not where it is terminated.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = litserve.LitServer(Pictures(max_batch_size=32, batch_timeout=0.002), accelerator="cpu")
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, timeout_keep_alive=60)
"""


class Peer(Protocol):
    """A server that runs.

    Attributes:
        name: What a table calls it.
    """

    name: str

    def connect(self) -> AbstractContextManager[Ask]:
        """Return a connection of its own, for one thread at a time."""


class Triton:
    """A Triton server that has a bundle's model.

    Attributes:
        address: Where it listens for gRPC.
    """

    name = "Triton"

    def __init__(self, address: str, card: Card) -> None:
        self.address, self._card = address, card

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        # Channels of one process to one address would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        with inference.InferenceServerClient(self.address, channel_args=options) as client:

            def infer(noise: Noise) -> Images:
                value = inference.InferInput("noise", noise.shape, "FP32")
                value.set_data_from_numpy(noise)
                images: Images = client.infer(self._card.name, [value]).as_numpy("images")
                return images

            def ask(seed: int, start: int, count: int) -> Images:
                noise = draw(seed, start, count, self._card.noise_size)
                return np.concatenate([infer(noise[at : at + LARGEST]) for at in range(0, count, LARGEST)])

            yield ask


class LitServe:
    """A LitServe server that has a bundle's model."""

    name = "LitServe"

    def __init__(self, port: int, card: Card) -> None:
        self._port, self._card = port, card

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        connection = HTTPConnection("127.0.0.1", self._port)

        def ask(seed: int, start: int, count: int) -> Images:
            noise = draw(seed, start, count, self._card.noise_size)
            connection.request("POST", "/predict", noise.tobytes(), {"Content-Type": "application/octet-stream"})
            reply = connection.getresponse()
            data = reply.read()
            if reply.status != 200:
                raise click.ClickException(f"LitServe should reply with 200. Received: {reply.status} {data[:80]!r}")
            return np.frombuffer(data, np.uint8).reshape(count, *self._card.image_shape)

        try:
            yield ask
        finally:
            connection.close()


@contextmanager
def triton(server: Path, bundle: Bundle, threads: int) -> Iterator[Triton]:
    """Run Triton on a bundle until the block ends.

    Args:
        server: Triton's folder in the unzipped wheel.
        bundle: The model.
        threads: CPU threads of the runtime; 0 for all cores.

    Raises:
        click.ClickException: it does not start, or does not load the model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "models"
        write_repository([bundle], folder, force=False)
        use_python(folder / bundle.card.name, threads)
        with tritonserver(server, folder) as (address, said):
            if (line := failure(said)) is not None:
                raise click.ClickException(f"Triton should load the model. Received: {line}")
            yield Triton(address, bundle.card)


@contextmanager
def litserve(python: Path, bundle: Bundle, threads: int) -> Iterator[LitServe]:
    """Run LitServe on a bundle until the block ends.

    Args:
        python: An interpreter that has litserve and onnxruntime.
        bundle: The model.
        threads: CPU threads of the runtime; 0 for all cores.

    Raises:
        click.ClickException: it does not start.
    """
    with tempfile.TemporaryDirectory() as temporary:
        script, model, port = Path(temporary) / "peer.py", Path(temporary) / "model.onnx", free_port()
        script.write_text(LITSERVE)
        model.write_bytes(bundle.data)
        words = [str(python.absolute()), str(script), str(model), str(threads), str(port)]
        with running(words, {}, until="Application startup complete"):
            yield LitServe(port, bundle.card)


def use_python(home: Path, threads: int) -> None:
    """Have Triton run a model's folder of its repository by a few lines of Python.

    Requests may wait longer than in the repository: clients that ask again as soon as they are answered keep a
    queue full, and what is refused would be no measure of speed.
    """
    config = home / "config.pbtxt"
    text = config.read_text().replace('backend: "onnxruntime"', 'backend: "python"')
    text = text.replace(f"microseconds: {PATIENCE}", f"microseconds: {WAIT}")
    config.write_text(f'{text}parameters {{ key: "threads" value {{ string_value: "{threads}" }} }}\n')
    (home / "1" / "model.py").write_text(TRITON)


@contextmanager
def tritonserver(server: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Run Triton on a repository until the block ends; give its gRPC address, and what it said until it served."""
    root, port = server.absolute(), free_port()
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "LD_LIBRARY_PATH": f"{root.parents[1]}/nvidia_pytriton.libs:{sys.base_prefix}/lib",
        "PYTHONPATH": ":".join(packages),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as temporary:
        backends = Path(temporary) / "backends"
        shutil.copytree(root / "backends", backends)
        stub = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
        shutil.copy(root / stub, backends / "python")
        (backends / "python" / "triton_python_backend_stub").chmod(0o755)
        words = [str(root / "bin" / "tritonserver"), "--model-repository", str(folder), "--exit-on-error=false"]
        words += ["--backend-directory", str(backends), "--allow-http=false", "--allow-metrics=false"]
        words += ["--grpc-address", "127.0.0.1", "--grpc-port", str(port)]
        with running(words, environment, until="Started GRPCInferenceService") as said:
            yield f"127.0.0.1:{port}", said


def failure(said: str) -> str | None:
    """Return why Triton did not load a model, from what it said, or None."""
    lines = (line[line.index("failed to load") :] for line in said.splitlines() if "failed to load" in line)
    return next((line.split("\\n")[0].strip('"') for line in lines), None)  # a stack comes as one line too


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def apart(peer: Peer, engine: Engine) -> int:
    """Return how many grey levels a peer's samples are from the engine's at most, asked for by several clients."""

    def check(start: int) -> int:
        with peer.connect() as ask:
            images = ask(0, start, CHECKED // THREADS)
        return int(np.abs(images.astype(np.int16) - engine.sample(0, start, CHECKED // THREADS)).max())

    with ThreadPoolExecutor(THREADS) as pool:
        return max(pool.map(check, range(0, CHECKED, CHECKED // THREADS)))


def rate(peer: Peer, clients: int, count: int, seconds: float) -> float:
    """Return the images a second of clients that each ask for `count` samples, again as soon as they have them."""
    with ExitStack() as stack, ThreadPoolExecutor(clients) as pool:
        asks = [stack.enter_context(peer.connect()) for _ in range(clients)]
        list(pool.map(lambda ask: ask(0, 0, count), asks))
        began = time.monotonic()

        def drain(ask: Ask) -> int:
            made = 0
            while time.monotonic() - began < seconds:
                made += len(ask(0, made, count))
            return made

        return sum(pool.map(drain, asks)) / (time.monotonic() - began)


@click.command()
@click.option("--triton", "server", type=click.Path(path_type=Path, exists=True), help="Its folder in the wheel.")
@click.option("--litserve", "python", type=click.Path(path_type=Path, exists=True), help="A Python that has it.")
@click.option("--threads", default=0, show_default=True, help="Of the runtime; 0: all cores.")
@click.option("--clients", default=8, show_default=True)
@click.option("--count", default=16, show_default=True, help="Samples a request.")
@click.option("--seconds", default=10.0, show_default=True)
def main(server: Path | None, python: Path | None, threads: int, clients: int, count: int, seconds: float) -> None:
    """Compare the peers' samples with the engine's, and print their images a second."""
    bundle = load(DEFAULT)
    engine = Engine(bundle, "cpu", threads)
    peers: list[AbstractContextManager[Peer]] = [triton(server, bundle, threads)] if server else []
    peers += [litserve(python, bundle, threads)] if python else []
    if not peers:
        raise click.UsageError("expected --triton, --litserve or both")
    for start in peers:
        with start as peer:
            levels = apart(peer, engine)
            speed = rate(peer, clients, count, seconds)
            print(
                f"{peer.name:10} {CHECKED} samples at most {levels} grey levels from the engine's; "
                f"{speed:.1f} images/s (clients: {clients}, samples a request: {count})",
                flush=True,
            )


if __name__ == "__main__":
    main()
