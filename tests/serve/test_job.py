"""sample-cli: a folder of samples, made once, completed when stopped, never mixed up."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import BIN, assert_clear_error, command


def sample(bundle: Path, out: Path, *words: object, n: int = 10) -> subprocess.CompletedProcess[str]:
    return command("sample-cli", "--model", bundle, "--out", out, "--n", n, *words)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_index_addressing(smoke_bundle: Path, tmp_path: Path) -> None:
    assert sample(smoke_bundle, tmp_path / "many", "--seed", 7, n=200).returncode == 0
    assert sample(smoke_bundle, tmp_path / "few", "--seed", 7, "--start", 100, "--batch", 3, n=5).returncode == 0
    for index in range(100, 105):
        name = f"{index:09d}.png"
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    manifest = json.loads((tmp_path / "few" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("model", "seed", "start", "count")} == {
        "model": "smoke",
        "seed": 7,
        "start": 100,
        "count": 5,
    }
    assert len(manifest["digest"]) == 64


def test_the_same_command_completes_what_is_missing(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, n=40)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.png")}
    for gone in (3, 4, 39):
        (out / f"{gone:09d}.png").unlink()
    (out / f"{17:09d}.png").write_bytes(b"")  # what a crash of the machine can leave
    result = sample(smoke_bundle, out, n=40)
    assert "4 made" in result.stdout
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == {k: v[0] for k, v in before.items()}
    assert (out / f"{5:09d}.png").stat().st_mtime_ns == before[f"{5:09d}.png"][1]
    assert "5 made" in sample(smoke_bundle, out, n=45).stdout


def test_another_job_is_not_mixed_in_unless_told(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out)
    kept = (out / f"{0:09d}.png").read_bytes()
    assert_clear_error(sample(smoke_bundle, out, "--seed", 1), "another job's files (seed 0, not 1)", "--mix")
    assert (out / f"{0:09d}.png").read_bytes() == kept
    assert sample(smoke_bundle, out, "--seed", 1, "--mix").returncode == 0
    assert (out / f"{0:09d}.png").read_bytes() != kept

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "mine.jpg").write_text("precious")
    assert_clear_error(sample(smoke_bundle, photos), "not of a job", "--mix")
    assert names(photos) == ["mine.jpg"]


@pytest.mark.parametrize(("kind", "ending"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_formats(smoke_bundle: Path, tmp_path: Path, kind: str, ending: str) -> None:
    out = tmp_path / "out"
    assert sample(smoke_bundle, out, "--format", kind, n=3).returncode == 0
    reference = tmp_path / "npy"
    sample(smoke_bundle, reference, "--format", "npy", n=3)
    wanted = np.load(reference / f"{0:09d}.npy")
    for index in range(3):
        picture = np.asarray(Image.open(out / f"{index:09d}.{ending}")).astype(int)
        assert np.abs(picture - wanted[index]).max() <= (20 if kind == "jpeg" else 0)


def test_npy_comes_in_files_of_a_thousand(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--format", "npy", n=1500)
    assert [len(np.load(path)) for path in sorted(out.glob("*.npy"))] == [1000, 500]
    (out / f"{0:09d}.npy").unlink()
    assert "1,000 made" in sample(smoke_bundle, out, "--format", "npy", n=1500).stdout


def test_the_contact_sheet(smoke_bundle: Path, tmp_path: Path) -> None:
    assert sample(smoke_bundle, tmp_path / "out", "--grid", "4x2").returncode == 0
    assert Image.open(tmp_path / "out" / "grid.png").size == (4 * 18 + 2, 2 * 18 + 2)


def test_a_full_disk_is_one_line_and_nothing_is_half_written(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", "1500", "--format", "npy"]

    def small_files() -> None:  # the kernel refuses to write past this size, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, preexec_fn=small_files)
    assert_clear_error(result, "cannot write to", "the same command completes it")
    assert names(out) == ["manifest.json"]
    assert sample(smoke_bundle, out, "--format", "npy", n=1500).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_leaves_whole_files_only(number: int, code: int, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [str(BIN / "sample-cli"), "--model", str(smoke_bundle), "--out", str(out), "--n", "30000", "--batch", "8"]

    def as_in_a_terminal() -> None:  # a shell starts background jobs, and so their tests, deaf to SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, preexec_fn=as_in_a_terminal, **pipes) as process:
        while not (out / f"{100:09d}.png").exists():
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    made = [path for path in out.iterdir() if path.suffix == ".png"]
    assert 100 <= len(made) < 30000
    assert not [name for name in names(out) if name.startswith(".part")]
    for path in made[:50]:
        Image.open(path).verify()


@pytest.mark.parametrize(
    "words",
    [
        ("--n", 0),
        ("--n", -3),
        ("--n", 10**12),
        ("--n", "many"),
        ("--n", 1, "--seed", -1),
        ("--n", 1, "--seed", 2**64),
        ("--n", 2, "--start", 2**63 - 1),
        ("--n", 1, "--temperature", "nan"),
        ("--n", 1, "--temperature", -1),
        ("--n", 1, "--format", "gif"),
        ("--n", 1, "--grid", "0x4"),
        ("--n", 1, "--precision", "fp16"),
        ("--n", 1, "--precision", "int8", "--model", "mine.onnx"),
        ("--n", 1, "--precision", "int8", "--server", "127.0.0.1:8470"),
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
