"""The cache that makes the second start a short one, whatever becomes of it."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import draw_faces
from tests.training.test_data import same
from training.data.dataset import load_data
from training.errors import DataError
from training.recipes import recipe

SMOKE = recipe("smoke")

pytestmark = pytest.mark.usefixtures("user_cache")


def child(code: str, *words: object, **more: object) -> subprocess.Popen[str]:
    """Run Python on its own, with our pictures' names imported."""
    imports = "import sys; from pathlib import Path; from training.data.dataset import load_data; "
    imports += "from training.recipes import recipe; SMOKE = recipe('smoke')\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", imports + code, *map(str, words)], text=True, **pipes, **more)


def stored(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.pictures")}


def test_the_second_start_decodes_nothing(tmp_path: Path, user_cache: Path) -> None:
    data = draw_faces(tmp_path / "data", 20)
    (data / "broken.png").write_text("no picture")
    steps: list[tuple[int, int]] = []
    first = load_data(data, SMOKE, skip_unreadable=True, advance=lambda *at: steps.append(at))
    assert steps[-1] == (21, 21)
    assert [reason for _, reason in first.train.report.broken] == ["not a picture that Pillow knows"]
    files = stored(user_cache)
    assert len(files) == 1
    steps.clear()
    second = load_data(data, SMOKE, skip_unreadable=True, advance=lambda *at: steps.append(at))
    assert same(first, second)
    assert isinstance(second.train.images, np.memmap)
    assert not steps
    with pytest.raises(DataError, match=r"broken\.png: not a picture"):
        load_data(data, SMOKE)
    moved = load_data(data.rename(tmp_path / "moved"), SMOKE, skip_unreadable=True)
    assert np.array_equal(moved.train.images, first.train.images)
    assert stored(user_cache) == files


def test_a_file_that_could_not_be_had_is_tried_again(tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 3)
    (data / "link.png").symlink_to(tmp_path / "later.png")
    os.mkfifo(data / "pipe.png")
    report = load_data(data, SMOKE, skip_unreadable=True).train.report
    assert [reason for _, reason in report.broken] == ["no such file or directory", "not a file"]
    (data / "pipe.png").unlink()
    shutil.copy(data / "000.png", tmp_path / "later.png")
    assert load_data(data, SMOKE).train.report.counts == {"train": 4}


def test_another_picture_or_another_size_is_stored_anew(tmp_path: Path) -> None:
    data, cache = draw_faces(tmp_path / "data", 10), tmp_path / "cache"
    first = load_data(data, SMOKE, cache=cache)
    for number, change in enumerate(({"side": 32}, {"resize": "nearest"}, {"channels": 1}, {"crop": (0, 20, 0, 20)})):
        load_data(data, replace(SMOKE, **change), cache=cache)
        assert len(stored(cache)) == number + 2
    load_data(data, replace(SMOKE, flip=True, lr=0.5), cache=cache)  # nothing to do with what is stored
    assert len(stored(cache)) == 5
    shutil.copy(data / "004.png", data / "003.png")
    second = load_data(data, SMOKE, cache=cache)
    assert len(stored(cache)) == 6
    assert np.array_equal(second.train.images[3], first.train.images[4])
    assert not (tmp_path / "xdg").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "other trailer", "other pixels", "other facts", "a folder"])
def test_a_damaged_cache_is_built_again(damage: str, pictures: Path, user_cache: Path) -> None:
    first = load_data(pictures, SMOKE)
    wanted = first.train.images.copy()
    (file,) = user_cache.glob("*.pictures")
    data = bytearray(file.read_bytes())
    file.unlink()
    at = {"other trailer": len(data) - 3, "other pixels": 20_000, "other facts": len(data) - 100}.get(damage, 0)
    data[at] ^= 255
    file.write_bytes({"empty": b"", "cut": data[:-1000]}.get(damage, data))
    for note in user_cache.glob("*.note"):
        note.write_bytes(note.read_bytes()[:-1])
    if damage == "a folder":
        file.unlink()
        (user_cache / f"{file.name}").mkdir()
        with pytest.raises(DataError, match="another folder with --cache"):
            load_data(pictures, SMOKE)
        return
    again = load_data(pictures, SMOKE)
    assert np.array_equal(again.train.images, wanted)
    assert again.train.digest == first.train.digest
    stored_now = stored(user_cache)
    assert same(again, load_data(pictures, SMOKE))
    assert stored(user_cache) == stored_now


def test_a_killed_build_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    data, cache = draw_faces(tmp_path / "data", 300), tmp_path / "cache"
    builder = """
whole = []
def advance(done, total):
    whole.append(done == total)
    if any(whole) and 100 < done < total:  # all files were read, some are decoded
        print(done, total, flush=True)
        sys.stdin.read()
load_data(Path(sys.argv[1]), SMOKE, cache=Path(sys.argv[2]), advance=advance)
"""
    with child(builder, data, cache) as process:
        assert process.stdout
        done, total = map(int, process.stdout.readline().split())
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 100 < done < total == 300
    (part,) = cache.glob(".part-*")
    splits = load_data(data, SMOKE, cache=cache)
    assert same(splits, load_data(data, SMOKE, cache=tmp_path / "other"))
    os.utime(part, (0, 0))  # long ago
    load_data(data, replace(SMOKE, side=32), cache=cache)
    assert not part.exists()


def test_two_processes_may_build_the_same(tmp_path: Path) -> None:
    data, cache = draw_faces(tmp_path / "data", 100), tmp_path / "cache"
    builder = """
print("ready", flush=True)
sys.stdin.readline()
print(load_data(Path(sys.argv[1]), SMOKE, cache=Path(sys.argv[2])).train.digest)
"""
    processes = [child(builder, data, cache) for _ in range(2)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    digests = {process.communicate()[0].strip() for process in processes}
    assert digests == {load_data(data, SMOKE, cache=cache).train.digest}
    assert len(stored(cache)) == 1
    assert not list(cache.glob(".part-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures: Path, tmp_path: Path) -> None:
    def small_files() -> None:  # the kernel refuses to write past this size, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    cache = tmp_path / "cache"
    builder = """
try:
    load_data(Path(sys.argv[1]), SMOKE, cache=Path(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, error)
"""
    with child(builder, pictures, cache, preexec_fn=small_files) as process:
        out, _ = process.communicate()
    assert out.startswith(f"DataError cannot write to {cache}: file too large")
    assert "--cache" in out
    assert out.count("\n") == 1
    assert not stored(cache)
    assert not list(cache.glob(".part-*"))
    cache.joinpath("file").write_text("x")
    with pytest.raises(DataError, match=r"cannot write to .*file: .*--cache"):
        load_data(pictures, SMOKE, cache=cache / "file")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_more_pictures_than_memory(tmp_path: Path) -> None:
    large = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (125_000, 64, 64, 3))  # 1.5 GB, a hole
    large[::1000] = 7
    del large
    drawer = """
import numpy as np
from dataclasses import replace
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
before = peak()
train = load_data(Path(sys.argv[1]), replace(recipe("celeba"), flip=True)).train
train.digest
order = np.random.default_rng(0).permutation(len(train))
total = sum(int(train.batch(order[at : at + 100], np.random.default_rng(at)).sum()) for at in range(0, 10_000, 100))
print(len(train), total, peak() - before)
"""
    with child(drawer, tmp_path / "x.npy") as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    count, total, grown = map(int, out.split())
    assert count == 125_000
    assert total > 0
    assert grown < 100, f"{grown} MB"
