"""sample-cli's options: which go together, and what each way of sampling takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import assert_clear_error, command


@pytest.mark.parametrize(
    ("words", "where"),
    [
        *(
            (("--server", "127.0.0.1:1", *words), "without --server")
            for words in (("--device", "cpu"), ("--device", "auto"), ("--threads", 2), ("--batch", 4))
        ),
        *(
            ((*more, *words), "with --server")
            for words in (
                ("--token", "x"),
                ("--wait", 3),
                ("--tls",),
                ("--ca", "ca.pem"),
                ("--cert", "my.pem"),
                ("--key", "my.key"),
            )
            for more in ((), ("--model", "mine.onnx"))
        ),
        (("--precision", "int8", "--server", "127.0.0.1:1"), "on the embedded faces"),
        (("--precision", "fp32", "--model", "mine.onnx"), "on the embedded faces"),
    ],
)
def test_an_option_that_has_no_effect_is_an_error(words: tuple[object, ...], where: str, tmp_path: Path) -> None:
    result = command("sample-cli", "--out", tmp_path / "out", "--n", 1, *words)
    assert_clear_error(result, f"has an effect only {where}", code=2)


def test_a_token_of_the_environment_is_for_whoever_needs_it(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ("--model", smoke_bundle, "--out", tmp_path / "out", "--n", 1, "--format", "jpg")
    result = command("sample-cli", *words, SAMPLE_TOKEN="x")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "000000000.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["format"] == "jpeg"  # which is what it is


@pytest.mark.parametrize(
    "words",
    [
        ("--n", 0),
        ("--n", -3),
        ("--n", 10**12 + 1),
        ("--n", "many"),
        ("--n", 1, "--seed", -1),
        ("--n", 1, "--seed", 2**64),
        ("--n", 2, "--start", 2**63 - 1),
        ("--n", 1, "--temperature", "nan"),
        ("--n", 1, "--temperature", -1),
        ("--n", 1, "--format", "gif"),
        ("--n", 1, "--grid", "0x4"),
        ("--n", 1, "--grid", "4x00"),
        ("--n", 1, "--grid", "101x100"),
        ("--n", 1, "--precision", "fp16"),
        ("--n", 1, "--server", ""),
    ],
)
def test_usage_errors(words: tuple[object, ...], tmp_path: Path) -> None:
    assert_clear_error(command("sample-cli", "--out", tmp_path / "out", *words), code=2)
    assert not (tmp_path / "out").exists()


def test_the_embedded_faces_come_in_two_precisions(tmp_path: Path) -> None:
    """The same faces, by two models: each a little off the other, and told apart by their digests."""
    pictures = []
    for name, words in {"default": (), "fp32": ("--precision", "fp32"), "int8": ("--precision", "int8")}.items():
        result = command("sample-cli", "--n", 20, "--out", tmp_path / name, "--format", "npy", *words)
        assert result.returncode == 0, result.stderr
        pictures.append(np.concatenate([np.load(path) for path in sorted((tmp_path / name).glob("*.npy"))]))
    default, exact, rounded = (each.astype(int) for each in pictures)
    assert np.array_equal(default, exact)
    assert 0 < np.abs(exact - rounded).mean() < 1
    assert_clear_error(
        command("sample-cli", "--n", 20, "--out", tmp_path / "int8", "--format", "npy"), "another job's files"
    )
