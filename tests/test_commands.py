"""What holds for every command."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import BIN, assert_clear_error, command

HOMES = {
    "train-vae": "training.cli",
    "evaluate-vae": "training.evaluation.cli",
    "export-onnx": "export.cli",
    "serve-vae": "serve.server.cli",
    "sample-cli": "serve.sample_cli",
}
HEAVY = ("tensorflow", "keras", "onnxruntime", "onnx", "grpc", "numpy", "rich", "matplotlib", "sklearn", "scipy")


@pytest.mark.parametrize("name", HOMES)
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; from {HOMES[name]} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, check=True)
    assert "Usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("name", HOMES)
def test_version_and_wrong_flags(name: str) -> None:
    assert "0.1.0" in command(name, "--version").stdout
    assert_clear_error(command(name, "--no-such-flag"), "No such option", code=2)
