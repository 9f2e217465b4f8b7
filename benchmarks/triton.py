"""Our model repository in a real Triton server.

    pip download --no-deps nvidia-pytriton==0.7.0, unzip the wheel, then
    python benchmarks/triton.py --server pytriton/tritonserver

That build has the python backend only. So Triton first reads the repository as it was written, and says that it
lacks the onnxruntime backend; then the same config, but for its backend, runs the bundle through a few lines of
Python, and its pictures over gRPC are compared with the engine's.

The build's Python layer was made for NumPy 1: on NumPy 2 `as_numpy` and arrays given to `Tensor` lose their strides
and bytes without a word. DLPack passes the same memory without NumPy's C interface. It needs NumPy 2: with NumPy 1.26
this build crashes on DLPack, and does not need it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc as triton

from export.triton import write_repository
from serve.bundle import DEFAULT, load
from serve.engine import Engine
from serve.noise import draw

MODEL = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, arguments):
        path = arguments["model_repository"] + "/" + arguments["model_version"] + "/model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        noise = [np.from_dlpack(utils.get_input_tensor_by_name(each, "noise")) for each in requests]
        images = self.session.run(["images"], {"noise": np.concatenate(noise)})[0]
        parts = np.split(images, np.cumsum([len(each) for each in noise])[:-1])
        return [utils.InferenceResponse([utils.Tensor.from_dlpack("images", part)]) for part in parts]
"""


@click.command()
@click.option(
    "--server",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Triton's folder in the unzipped wheel.",
)
@click.option("--model", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--port", default=18001, show_default=True)
@click.option("--count", default=512, show_default=True)
def main(server: Path, model: Path, port: int, count: int) -> None:
    """Print what Triton says, and what it makes."""
    bundle = load(model)
    name = bundle.card.name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "models"
        write_repository([bundle], folder, force=False)
        backends = Path(temporary) / "backends"
        shutil.copytree(server / "backends", backends)
        stub = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
        shutil.copy(server / stub, backends / "python")
        (backends / "python" / "triton_python_backend_stub").chmod(0o755)
        said = _run(server, folder, port, until="Started GRPCInferenceService")[1]
        print("as written:", next((line.split("] ")[-1] for line in said if "failed to load" in line), "loaded"))

        config = folder / name / "config.pbtxt"
        config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
        (folder / name / "1" / "model.py").write_text(MODEL)
        process, _ = _run(server, folder, port, until="Started GRPCInferenceService", keep=True)
        assert process is not None
        try:
            _ask(bundle.card.noise_size, Engine(load(model), device="cpu"), name, port, count)
        finally:
            process.terminate()
            process.wait(60)


def _ask(size: int, engine: Engine, name: str, port: int, count: int) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        began = time.monotonic()
        while not client.is_model_ready(name):
            if time.monotonic() - began > 60:
                raise click.ClickException("the model is not ready after a minute")
            time.sleep(0.2)
        config = client.get_model_config(name).config
        print(f"python backend: {name} is ready; batches of {list(config.dynamic_batching.preferred_batch_size)}")
        apart, began = 0, time.monotonic()
        for at in range(0, count, 64):
            noise = draw(0, at, 64, size)
            value = triton.InferInput("noise", noise.shape, "FP32")
            value.set_data_from_numpy(noise)
            images = client.infer(name, [value]).as_numpy("images")
            apart = max(apart, int(np.abs(images.astype(int) - engine.run(noise)).max()))
        seconds = time.monotonic() - began
        print(f"{count} samples over gRPC: at most {apart} grey levels from the engine's ({seconds:.1f} s, both)")


def _run(
    server: Path, folder: Path, port: int, until: str, keep: bool = False
) -> tuple[subprocess.Popen[str] | None, list[str]]:
    """Start Triton on the loopback and read what it says until it serves; stop it unless it is to be kept."""
    root = server.absolute()
    here = Path(sys.executable).parent
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{root.parents[1]}/nvidia_pytriton.libs:{sys.base_prefix}/lib",
        "PYTHONPATH": ":".join(packages),
        "PATH": f"{here}:{os.environ['PATH']}",
    }
    words = [str(root / "bin" / "tritonserver"), "--model-repository", str(folder), "--exit-on-error=false"]
    words += ["--backend-directory", str(folder.with_name("backends")), "--allow-http=false", "--allow-metrics=false"]
    words += ["--grpc-address", "127.0.0.1", "--grpc-port", str(port)]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if until in line:
            break
    if keep:
        return process, said
    process.terminate()
    process.communicate(timeout=60)
    return None, said


if __name__ == "__main__":
    main()
