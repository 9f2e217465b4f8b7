"""--verify: proof of what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from serve.bulk import formats
from serve.bulk.job import make
from serve.bulk.verify import _near
from tests.conftest import assert_clear_error, command
from tests.serve.shell import SHARDED, sample, verify


@pytest.mark.parametrize("kind", ["jpeg", "webp", *SHARDED])
def test_verify_tells_what_a_folder_is(kind: str, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--format", kind, *(["--shard", 10] if kind in SHARDED else [])]
    sample(smoke_bundle, out, *words)
    files = 10 if kind in SHARDED else 100
    result = verify(smoke_bundle, out, "--fraction", 0.5)
    assert f"{files} files; of {files // 2} that were made again, {files // 2} are the same bytes" in result.stdout
    path = sorted(out.glob("0*"))[3]
    path.unlink()
    result = verify(smoke_bundle, out, "--fraction", 1)
    assert f"of {files - 1} that were made again, {files - 1} are the same bytes" in result.stdout
    assert_clear_error(
        result, f"Error: missing: 1 of {files} files, such as {path.name}; the command that made {out} makes"
    )
    path.symlink_to(tmp_path / "nowhere")
    other = sorted(out.glob("0*"))[5]
    other.unlink()
    result = verify(smoke_bundle, out, "--fraction", 1)
    assert_clear_error(
        result, f"such as {other.name}; damaged, or other pictures: 1 of", f"such as {path.name}; remove"
    )


def test_verify_follows_a_folder_that_was_moved(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--start", 9_998, n=5)
    shutil.move(out / "000001", tmp_path / "elsewhere")
    (out / "000001").symlink_to(tmp_path / "elsewhere")
    result = verify(smoke_bundle, out, "--fraction", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert "5 files; of 5 that were made again, 5 are the same bytes" in result.stdout


def test_verify_allows_a_grey_level_and_no_more(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--format", "npy", n=10)
    path = out / "000000000.npy"
    images = np.load(path)
    for level, code in ((1, 0), (2, 1)):
        changed = images.astype(int)
        changed[3, 5, 5, 0] += level if changed[3, 5, 5, 0] < 128 else -level
        np.save(path, changed.astype(np.uint8))
        result = verify(smoke_bundle, out, "--json")
        assert result.returncode == code
        told = json.loads(result.stdout.splitlines()[-1])
        assert (told["same"], told["near"], told["wrong"]) == ((0, 1, []) if level == 1 else (0, 0, [path.name]))


def test_verify_reads_grey_pictures_of_a_format_that_has_none() -> None:
    job = make("m", "d", "exact", seed=0, start=0, count=1, temperature=1.0, kind="webp", shard=0, encoding="")
    grey = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 1), np.uint8)
    (data,) = formats.encoded(job, grey)
    assert _near(job, bytes(data), grey)
    assert _near(job, bytes(data), grey + 1)
    assert not _near(job, bytes(data), grey // 2)


def test_verify_takes_the_model_that_made_it(smoke_bundle: Path, tmp_path: Path) -> None:
    assert_clear_error(verify(smoke_bundle, tmp_path), "has no manifest.json")
    sample(smoke_bundle, tmp_path / "out", n=3)
    assert_clear_error(command("sample-cli", "--verify", tmp_path / "out"), "was made with the model")
    result = verify(smoke_bundle, tmp_path / "out", "--seed", 3)
    assert result.returncode == 2
    assert "--seed has an effect only without --verify" in result.stderr
