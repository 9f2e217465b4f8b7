"""The console scripts: each makes sure that the packages it uses are ours, and hands over to its command.

The check is here, under a name of our own, since a hidden package cannot tell that it is hidden.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn

from balanced_vae import check_not_hidden


def train_vae() -> NoReturn:
    """Run `train-vae`."""
    _run("training.cli", "training")


def evaluate_vae() -> NoReturn:
    """Run `evaluate-vae`."""
    _run("training.evaluation.cli", "training", "serve")


def export_onnx() -> NoReturn:
    """Run `export-onnx`."""
    _run("export.cli", "export", "training", "serve")


def serve_vae() -> NoReturn:
    """Run `serve-vae`."""
    _run("serve.server.cli", "serve")


def sample_cli() -> NoReturn:
    """Run `sample-cli`."""
    _run("serve.sample_cli", "serve")


def _run(command: str, *packages: str) -> NoReturn:
    try:
        check_not_hidden(*packages)
    except ImportError as error:
        sys.exit(f"Error: {error}")
    if "training" in packages:
        import_module("training.backend").spare()
    if sys.stdout:
        binary = io.BufferedWriter(_Output(sys.stdout.fileno(), "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(
            binary, sys.stdout.encoding, sys.stdout.errors, line_buffering=sys.stdout.isatty()
        )
    try:
        sys.exit(import_module(command).main())
    finally:
        if sys.stdout:
            sys.stdout.flush()  # what cannot be written is said here, and not as the interpreter ends


class _Output(io.FileIO):
    """Stdout, whose reader may leave before the end, as `head` does: then the command ends, as the shell's own do.

    The commands catch OSError where they read and write files; this is none of theirs, nor is a disk that is full.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still in the buffer
            if isinstance(error, BrokenPipeError):
                sys.exit(128 + signal.SIGPIPE)
            sys.exit(f"Error: cannot write to stdout: {error.strerror or error}")
