"""What a power cut leaves: the order in which a training run's system calls reach the disk, as strace saw them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BIN
from training.errors import WriteError
from training.files import append_line, replacing, write_json

CALL = re.compile(r"^(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>\d+)")
DESCRIPTOR = re.compile(r"^\d+<(?P<path>/[^>]*)>")


class Disk:
    """What of a folder is sure to be there after a power cut: bytes that were synced, names whose folder was.

    Everything else may be there or not, in any mixture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.unsynced: set[str] = set()  # files with bytes that may be lost
        self.unnamed: set[str] = set()  # files whose name may be missing, or be another file's
        self.renamed: list[str] = []

    def safe(self, path: str) -> bool:
        return path not in self.unsynced | self.unnamed

    def see(self, name: str, arguments: str) -> None:
        paths = [path for path in re.findall(r'"([^"]*)"', arguments) if path.startswith(self.folder)]
        here = DESCRIPTOR.match(arguments)
        target = here["path"] if here and here["path"].startswith(self.folder) else ""
        if name in ("write", "pwrite64", "writev", "ftruncate") and target:
            self.unsynced.add(target)
        elif name == "openat" and paths and "O_CREAT" in arguments and not self.known(paths[0]):
            self.unnamed.add(paths[0])
        elif name in ("fsync", "fdatasync") and target:
            self.unsynced.discard(target)
            self.unnamed -= {path for path in self.unnamed if os.path.dirname(path) == target}
        elif name.startswith("rename") and len(paths) == 2:
            part, path = paths
            assert part not in self.unsynced, f"{path} could be there without its bytes"
            self.unnamed = self.unnamed - {part} | {path}
            self.renamed.append(path)
            self.after_rename(path)
        elif name.startswith("unlink") and paths:
            assert not paths[0].endswith((".npz", ".keras")), f"{paths[0]} is what going on takes"

    def known(self, path: str) -> bool:
        return path in self.renamed or path in self.unnamed

    def after_rename(self, path: str) -> None:
        """A state says that so many epochs are over: their records cannot be lost any more."""
        if path.endswith(".npz"):
            for name in ("history.jsonl", "trace.jsonl", "config.json"):
                assert self.safe(f"{self.folder}/{name}"), f"{path} could be there without {name}'s last line"


def whole(lines: list[str]) -> Iterator[str]:
    """Each call in one line, at its end, where strace wrote what other threads did in between."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, said = line.split(maxsplit=1)
        if said.endswith(" <unfinished ...>"):
            begun[thread] = said.removesuffix(" <unfinished ...>")
        elif said.startswith("<... "):
            yield begun.pop(thread) + said.partition(" resumed>")[2]
        else:
            yield said


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace, which sees system calls")
def test_a_power_cut_at_any_moment_leaves_a_run_that_goes_on(pictures: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "calls", tmp_path / "runs" / "run"
    calls = "write,pwrite64,writev,ftruncate,openat,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    tracer = ["strace", "--seccomp-bpf", "-f", "-y", "-s", "4096", "-e", f"trace={calls}", "-o", str(log)]
    words = [str(BIN / "train-vae"), "--recipe", "smoke", "--data", str(pictures), "--out", str(out)]
    words += ["--save-every", "0", "--set", "priors=second-stage,gaussian"]
    result = subprocess.run([*tracer, *words], capture_output=True, text=True, timeout=900)
    if not log.exists() or not log.stat().st_size:
        pytest.skip(f"strace may not trace here: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    disk = Disk(out)
    for line in whole(log.read_text().splitlines()):
        if call := CALL.match(line):
            disk.see(call["name"], call["arguments"])
    stays = {str(path) for path in out.glob("*.*")}
    assert {os.path.basename(path) for path in stays} >= {"stage1.keras", "prior-gaussian.keras", "history.jsonl"}
    assert all(disk.safe(path) for path in stays)
    assert all(disk.safe(f"{out}/state/stage{stage}.npz") for stage in (1, 2))  # more epochs go on from these
    assert f"{out}/state/stage2.npz" in disk.renamed


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, [1])
    with pytest.raises(FileNotFoundError), replacing(path) as part:
        part.write_text((tmp_path / "absent").read_text())
    assert path.read_text() == "[\n  1\n]\n"
    assert os.listdir(path.parent) == ["file.json"]
    with pytest.raises(WriteError, match=r"cannot write to .*file.json/x: file exists"):
        write_json(path / "x", [])
    with pytest.raises(WriteError, match=r"cannot write to .*/new: is a directory"):
        append_line(path.parent, "x")


def test_an_error_at_another_file_is_not_called_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "file"):
        (tmp_path / "absent").read_bytes()
    assert not os.listdir(tmp_path)
