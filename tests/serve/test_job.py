"""sample-cli: a folder of samples, made once, completed when stopped, never mixed up."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def sampling(bundle: Path, out: Path, *words: object, n: int) -> Iterator[subprocess.Popen[str]]:
    """A sample-cli in the middle of its work: it has said what the folder is for, and made some of it."""
    full = [BIN / "sample-cli", "--model", bundle, "--out", out, "--n", n, "--batch", 1, *words]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, full)], **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    while not true():
        assert process.poll() is None


def seed_of(out: Path) -> int:
    try:
        return int(json.loads((out / "manifest.json").read_text())["seed"])
    except FileNotFoundError:
        return -1


def assert_all_of(out: Path, bundle: Path, seed: int, tmp_path: Path) -> None:
    """Every picture of the folder is the one that its name and the seed say, and nothing else lies there."""
    count = len(names(out)) - 1
    reference = tmp_path / f"reference-{seed}-{count}"
    assert sample(bundle, reference, "--seed", seed, n=count).returncode == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == {
        path.name: path.read_bytes() for path in reference.glob("*.png")
    }
    assert names(out) == names(reference)


def test_a_second_sample_cli_is_refused_while_one_writes(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sampling(smoke_bundle, out, n=10_000) as first:
        until(first, (out / f"{20:09d}.png").exists)
        for words in ((), ("--mix",), ("--mix", "--seed", 1), ("--grid", "2x2"), ("--format", "npy")):
            refused = sample(smoke_bundle, out, *words)
            assert_clear_error(refused, f"another sample-cli is writing to {out}; wait for it, or choose another --out")
        first.kill()  # the lock goes with the process
        first.wait(60)
    resumed = sample(smoke_bundle, out, n=500)
    assert resumed.returncode == 0, resumed.stderr
    for path in out.glob("*.png"):
        Image.open(path).verify()
    assert [name for name in names(out) if not name.endswith(".png")] == ["manifest.json"]


def test_of_many_that_start_together_one_has_the_folder(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        sampling(smoke_bundle, out, "--seed", 1, n=400) as one,
        sampling(smoke_bundle, out, "--seed", 2, n=400) as two,
        sampling(smoke_bundle, out, "--seed", 3, n=400) as three,
    ):
        ended = {
            seed: (each.communicate(timeout=900)[1], each.returncode) for seed, each in enumerate((one, two, three), 1)
        }
    (seed,) = [seed for seed, (_, code) in ended.items() if code == 0]
    for other in set(ended) - {seed}:
        assert "another sample-cli is writing" in ended[other][0] or "another job's files" in ended[other][0]
    assert seed_of(out) == seed
    assert_all_of(out, smoke_bundle, seed, tmp_path)


def test_a_job_that_was_killed_as_it_took_over_a_folder_leaves_nothing_of_the_one_before(
    smoke_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, n=2000)
    with sampling(smoke_bundle, out, "--seed", 1, "--mix", n=2000) as second:
        until(second, lambda: seed_of(out) == 1)
        second.send_signal(signal.SIGKILL)
        second.wait(60)
    assert sample(smoke_bundle, out, "--seed", 1, n=2000).returncode == 0
    assert_all_of(out, smoke_bundle, 1, tmp_path)


def test_a_job_that_grows_takes_no_other_file_for_its_own(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, n=20)
    assert "5 made" in sample(smoke_bundle, out, "--seed", 1, "--mix", n=5).stdout
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_clear_error(sample(smoke_bundle, out, "--seed", 1, n=20), "not of this job", "--mix")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "15 made" in sample(smoke_bundle, out, "--seed", 1, "--mix", n=20).stdout
    assert_all_of(out, smoke_bundle, 1, tmp_path)


def test_a_job_that_grows_leaves_those_in_folders_below(smoke_bundle: Path, tmp_path: Path) -> None:
    """Their shards have its tag: they are of the same model and seed."""
    out, more = tmp_path / "out", tmp_path / "out" / "more"
    words = ["--format", "webdataset", "--shard", 10]
    sample(smoke_bundle, out, *words, n=15)
    sample(smoke_bundle, more, *words, "--start", 15, n=15)
    half = more / ".part-01234567-manifest.json"
    half.write_text("half")  # of somebody who is writing there
    before = {path.name: path.read_bytes() for path in more.iterdir()}
    assert sample(smoke_bundle, out, *words, n=30).returncode == 0
    assert len(list(out.glob("*.tar"))) == 3  # the second of the shorter job went
    assert {path.name: path.read_bytes() for path in more.iterdir()} == before
    (out / "manifest.json").unlink()
    assert_clear_error(sample(smoke_bundle, out, "--seed", 1), "holds files that are not of a job")
    assert half.exists()


@pytest.mark.parametrize("left", [".part-manifest.json", ".part-000000003.png", ".sample-cli.lock"])
def test_what_a_killed_run_left_is_no_other_job(smoke_bundle: Path, tmp_path: Path, left: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / left).write_text("half")
    for words in (("--part", "0/1"), ()):
        result = sample(smoke_bundle, out, *words)
        assert result.returncode == 0, result.stderr
    assert_all_of(out, smoke_bundle, 0, tmp_path)


def test_a_folder_that_cannot_be_written_or_locked_is_one_line(smoke_bundle: Path, tmp_path: Path) -> None:
    assert_clear_error(sample(smoke_bundle, Path("/sys/kernel")), "cannot write to /sys/kernel")  # not even by root
    (tmp_path / "file").write_text("")
    assert_clear_error(sample(smoke_bundle, tmp_path / "file" / "out"), "cannot write to")
    # Some network file systems have no locks. None is at hand, so what the kernel answers there is said in its place.
    code = (
        "import errno, fcntl\n"
        "def flock(*_): raise OSError(errno.{0}, 'no locks here')\n"
        "fcntl.flock = flock\n"
        "from serve.sample_cli import main\n"
        "main()"
    )
    for each in ("ENOSYS", "ENOLCK", "EOPNOTSUPP"):
        words = ["--model", smoke_bundle, "--n", "1", "--out", tmp_path / "out"]
        result = subprocess.run([sys.executable, "-c", code.format(each), *words], capture_output=True, text=True)
        assert_clear_error(result, f"cannot lock {tmp_path / 'out'} (no locks here)", "choose an --out")
    assert not [name for name in names(tmp_path / "out") if name != ".sample-cli.lock"]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_by_one(data: bytes) -> bytes:
    return data[:-1]


def zeros_at_the_end(data: bytes) -> bytes:
    return data[:-20] + bytes(20)


def nothing(data: bytes) -> bytes:
    return b""


def all_zeros(data: bytes) -> bytes:
    return bytes(len(data))


def something_else(data: bytes) -> bytes:
    return b"<html>not found</html>"


DAMAGES = [cut, cut_by_one, nothing, all_zeros, something_else]


@pytest.mark.parametrize(
    ("kind", "count", "damages"),
    [*((kind, 20, [*DAMAGES, zeros_at_the_end]) for kind in ("png", "jpeg", "webp")), ("npy", 5500, DAMAGES)],
)
def test_a_damaged_file_is_made_again(
    smoke_bundle: Path, tmp_path: Path, kind: str, count: int, damages: list[Callable[[bytes], bytes]]
) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--format", kind, n=count)
    *files, _ = sorted(out.iterdir())
    good = {path: path.read_bytes() for path in files}
    for path, damage in zip(files, damages, strict=False):
        path.write_bytes(damage(good[path]))
    result = sample(smoke_bundle, out, "--format", kind, n=count)
    assert result.returncode == 0, result.stderr
    assert f"{len(damages) * (1000 if kind == 'npy' else 1):,} made" in result.stdout
    assert {path: path.read_bytes() for path in files} == good


def stored(images: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(images), allow_pickle=True)
    return file.getvalue()


def test_npy_files_of_another_shape_or_type_are_made_again(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--format", "npy", n=1200)
    first, _ = sorted(out.glob("*.npy"))
    good, images = first.read_bytes(), np.load(first)
    archive = io.BytesIO()
    np.savez(archive, images)
    chance = random.Random(0)
    for damaged in (
        stored(images.astype(np.int8)),
        stored(images[:, :8]),
        stored(images[..., 0]),
        stored(images[:200]),
        stored(np.concatenate([images, images])),
        stored(np.asfortranarray(images)),
        stored(images.ravel()),
        stored(7),
        stored([{}, None]),
        archive.getvalue(),
        good + b"\0",
        *(good[:at] + chance.randbytes(9) + good[at + 9 :] for at in (0, 6, 8, 20, 60)),
    ):
        first.write_bytes(damaged)
        result = sample(smoke_bundle, out, "--format", "npy", n=1200)
        assert result.returncode == 0, result.stderr
        assert "1,000 made" in result.stdout
        assert first.read_bytes() == good


def test_what_is_no_file_is_replaced_or_refused(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out)
    for index in (2, 3):
        (out / f"{index:09d}.png").unlink()
    os.mkfifo(out / f"{2:09d}.png")  # nobody will ever write to it
    (out / f"{3:09d}.png").symlink_to("nowhere")
    assert "2 made" in sample(smoke_bundle, out).stdout
    assert_all_of(out, smoke_bundle, 0, tmp_path)
    (out / f"{4:09d}.png").unlink()
    (out / f"{4:09d}.png").mkdir()
    assert_clear_error(sample(smoke_bundle, out), "cannot write to", "Is a directory")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"seed": 0}', "\0" * 300, "[" * 100_000, pytest.param(None, id="a count in words")]
)
def test_a_damaged_manifest_says_what_to_do(smoke_bundle: Path, tmp_path: Path, text: str | None) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out)
    manifest = out / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good.replace('"count": 10', '"count": "ten"') if text is None else text)
    assert_clear_error(sample(smoke_bundle, out), f"{manifest} is damaged", "choose another --out, or pass --mix")
    result = sample(smoke_bundle, out, "--mix")
    assert "10 made" in result.stdout
    assert manifest.read_text() == good
