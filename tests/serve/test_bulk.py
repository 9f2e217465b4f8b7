"""Samples by the million: shards that others load, object stores, and several processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve import load
from serve.bulk.job import Job, from_json, make
from serve.bulk.store import open_store
from tests.conftest import BIN, assert_clear_error, command
from tests.serve.shell import SHARDED, sample, verify


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file, by its path within the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Samples 0 to 199 of seed 7."""
    out = tmp_path_factory.mktemp("images") / "npy"
    assert sample(smoke_bundle, out, "--seed", 7, "--format", "npy", n=200).returncode == 0
    return np.load(out / "000000000.npy")


def test_datasets_shows_the_pictures_of_parquet(images: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample(smoke_bundle, out, "--seed", 7, "--format", "parquet", "--shard", 40).returncode == 0
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        str(out), split="train", cache_dir=str(tmp_path / "cache")
    )  # by the page's first lines
    assert len(found) == 100
    for row in (0, 39, 40, 99):
        assert (found[row]["index"], found[row]["seed"]) == (row, 7)
        np.testing.assert_array_equal(np.asarray(found[row]["image"]), images[row])
    names = sorted(path.name for path in out.glob("*.parquet"))
    assert [name[:25] for name in names] == [f"{at:012d}-{min(at + 39, 99):012d}" for at in (0, 40, 80)]


def test_webdataset_reads_the_shards(images: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--seed", 7, "--format", "webdataset", "--shard", 40, "--encoding", "webp"]
    assert sample(smoke_bundle, out, *words).returncode == 0
    webdataset = pytest.importorskip("webdataset")
    shards = sorted(map(str, out.glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [each["__key__"] for each in found] == [f"{index:012d}" for index in range(100)]
    np.testing.assert_array_equal(np.stack([np.asarray(each["webp"]) for each in found]), images[:100])


def test_the_manifest_lists_what_is_there_and_a_page_describes_it(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--format", "parquet", "--shard", 40, "--start", 10)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    listed = {each["name"]: (each["bytes"], each["sha256"]) for each in manifest["files"]}
    assert listed == {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in out.glob("*.parquet")
    }
    _, front, page = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["size_categories"] == ["n<1K"]
    for said in (load(smoke_bundle).digest, "10 to 109", "exact"):
        assert said in page


def test_many_pictures_lie_in_folders_of_ten_thousand(smoke_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(smoke_bundle, out, "--start", 9995, n=10)
    wanted = [f"{index:09d}.png" for index in range(9995, 10_000)]
    wanted += [f"000001/{index:09d}.png" for index in range(10_000, 10_005)]
    assert sorted(contents(out)) == sorted([*wanted, "manifest.json"])
    (out / wanted[7]).unlink()
    result = sample(smoke_bundle, out, "--start", 9995, n=12)
    assert "3 made" in result.stdout
    assert "9 were there" in result.stdout
    assert_clear_error(sample(smoke_bundle, out, "--start", 9995, "--seed", 1, n=12), "another job's files")


@pytest.mark.parametrize("kind", SHARDED)
def test_a_job_that_grows_has_no_sample_twice(kind: str, smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--format", kind, "--shard", 40]
    sample(smoke_bundle, tmp_path / "grown", *words, n=100)
    assert "80 were there" in sample(smoke_bundle, tmp_path / "grown", *words, n=150).stdout
    sample(smoke_bundle, tmp_path / "once", *words, n=150)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")
    before = contents(tmp_path / "grown")
    assert "0 made" in sample(smoke_bundle, tmp_path / "grown", *words, n=50).stdout
    assert contents(tmp_path / "grown") == before
    # Until all of it is there, no page says how many there are.
    part = sample(smoke_bundle, tmp_path / "grown", *words, "--part", "0/2", n=190)
    assert part.returncode == 0, part.stderr
    assert not (tmp_path / "grown" / "README.md").exists()


@pytest.mark.parametrize("kind", ["png", *SHARDED])
def test_killed_at_any_time_it_ends_as_if_it_never_was(kind: str, smoke_bundle: Path, tmp_path: Path) -> None:
    count, words = 3000, ["--format", kind, *(["--shard", "100"] if kind != "png" else [])]
    assert sample(smoke_bundle, tmp_path / "once", *words, n=count).returncode == 0
    out, chance = tmp_path / "out", random.Random(0)
    full = [BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", count, "--batch", 1, *words]
    for least in sorted(chance.sample(range(2, 12), 2)):
        with subprocess.Popen([*map(str, full)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while len(list(out.glob("0*"))) < least:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert sample(smoke_bundle, out, *words, n=count).returncode == 0
    assert contents(out) == contents(tmp_path / "once")


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_damaged_shard_is_made_again(kind: str, smoke_bundle: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["--format", kind, "--shard", 25]
    sample(smoke_bundle, out, *words)
    good = contents(out)
    one, two, three, four = sorted(name for name in good if name.startswith("0"))
    (out / one).write_bytes(good[one][:-100])
    (out / two).write_bytes(b"")
    (out / three).write_bytes(good[four])  # whole, but of other samples: as many, so only --verify tells
    result = sample(smoke_bundle, out, *words)
    assert "50 made" in result.stdout
    assert_clear_error(
        verify(smoke_bundle, out, "--fraction", 1),
        "Error: damaged, or other pictures: 1 of ",
        three,
    )


def test_several_processes_make_a_job_together(smoke_bundle: Path, tmp_path: Path) -> None:
    words = ["--format", "webdataset", "--shard", 20]
    sample(smoke_bundle, tmp_path / "once", *words, n=500)
    out = tmp_path / "out"
    full = [str(each) for each in (BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", 500, *words)]
    parts = [
        subprocess.Popen([*full, "--part", f"{part}/3"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for part in range(3)
    ]
    said = [each.communicate(timeout=600) for each in parts]
    assert [each.returncode for each in parts] == [0, 0, 0], said
    assert "complete" not in json.loads((out / "manifest.json").read_text())
    assert "0 made" in sample(smoke_bundle, out, *words, n=500).stdout
    assert contents(out) == contents(tmp_path / "once")


def test_parts_of_single_pictures_are_about_as_many(smoke_bundle: Path, tmp_path: Path) -> None:
    """In one folder of 10,000, or in several."""
    words = ["--start", 9_970, "--part"]
    for part, made in (("0/3", 16), ("1/3", 17), ("2/3", 17), ("2/3", 0)):  # of 30 in one folder, and 20 in the next
        assert f"{made} made" in sample(smoke_bundle, tmp_path / "out", *words, part, n=50).stdout
    assert "0 made, 50 were there" in sample(smoke_bundle, tmp_path / "out", "--start", 9_970, n=50).stdout


@settings(deadline=None)
@given(
    start=st.integers(0, 10**5),
    count=st.integers(1, 30_000),
    parts=st.integers(1, 60),
    kind=st.sampled_from(["png", "npy"]),
)
def test_parts_are_all_of_it_once(start: int, count: int, parts: int, kind: str) -> None:
    job = make("m", "d", "exact", start=start, count=count, kind=kind)
    shares = [[number for group in job.groups(part, parts) for number in group] for part in range(parts)]
    assert sorted(number for share in shares for number in share) == list(range(job.files))
    if kind == "png":
        folders = [{job.file(number).name.rpartition("/")[0] for number in group} for group in job.groups(0, parts)]
        assert all(len(each) <= 1 for each in folders)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_whoever_is_alone_waits_for_no_part(smoke_bundle: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ["--batch", 1, "--format", "npy", "--shard", 50]
    full = [BIN / "sample-cli", "--model", smoke_bundle, "--out", out, "--n", 20_000, *words, "--part", "1/2"]
    with subprocess.Popen([*map(str, full)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as part:
        try:
            while not list(out.glob("0*.npy")):
                assert part.poll() is None
            for more in ([], ["--part", "1/2"]):
                refused = sample(smoke_bundle, out, *words, *more, n=20_000)
                assert_clear_error(refused, f"another sample-cli is writing to {out}")
        finally:
            part.kill()


def test_a_pipe_takes_a_tar(images: Any, smoke_bundle: Path) -> None:
    words = [BIN / "sample-cli", "--model", smoke_bundle, "--out", "-", "--n", 200, "--seed", 7]
    result = subprocess.run([*map(str, words)], capture_output=True, check=True)
    assert result.stderr == b""
    with tarfile.open(fileobj=io.BytesIO(result.stdout), mode="r|") as archive:
        found = []
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found.append(np.asarray(Image.open(io.BytesIO(file.read()))))
    np.testing.assert_array_equal(np.stack(found), images)
    cut = subprocess.run(f"{' '.join(map(str, words))} | head -c 1000", shell=True, capture_output=True)
    assert (len(cut.stdout), cut.stderr) == (1000, b"")
    closed = subprocess.run(f"{' '.join(map(str, words))} >&-", shell=True, capture_output=True, text=True)
    assert_clear_error(closed, "--out - writes to stdout, and that is closed")


@pytest.mark.parametrize("words", [("--out", "-"), ("--out", "out"), ("--out", "out", "--json"), ("--version",)])
def test_a_full_disk_behind_stdout_is_one_line(words: tuple[str, ...], smoke_bundle: Path, tmp_path: Path) -> None:
    full = [str(BIN / "sample-cli"), "--model", str(smoke_bundle), "--n", "200", *words]
    with open("/dev/full", "w") as disk:
        result = subprocess.run(full, stdout=disk, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: cannot write to stdout: No space left on device\n")


def test_programs_read_lines_of_json(smoke_bundle: Path, tmp_path: Path) -> None:
    result = sample(smoke_bundle, tmp_path / "out", "--json", "--grid", "2x2")
    *_, end, sheet = map(json.loads, result.stdout.splitlines())
    assert (end["event"], end["made"], end["found"]) == ("end", 100, 0)
    assert sheet["sheet"] == f"{tmp_path / 'out'}/grid.png"
    again = json.loads(sample(smoke_bundle, tmp_path / "out", "--json").stdout.splitlines()[-1])
    assert (again["made"], again["found"], again["images_per_second"]) == (0, 100, 0)
    assert sample(smoke_bundle, tmp_path / "quiet", "--quiet").stdout == ""
    words = ("sample-cli", "--server", "127.0.0.1:1", "--wait", 1, "--n", 1, "--quiet", "--out", tmp_path / "none")
    (line,) = command(*words).stderr.splitlines()
    assert line.startswith("Error: no server answers at 127.0.0.1:1")
    both = sample(smoke_bundle, tmp_path / "both", "--quiet", "--json")
    assert (both.returncode, "--quiet or --json" in both.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--shard", 5], "--shard has an effect only with --format npy, parquet or webdataset"),
        (["--format", "npy", "--encoding", "png"], "--encoding has an effect only with --format parquet or webdataset"),
        (["--part", "3/3"], "I/N with 0 <= I < N"),
        (["--ray", "local"], "--ray takes --format npy, parquet or webdataset. Received: png"),
        (["--workers", 2], "--workers has an effect only with --ray"),
        (["--fraction", 0.5], "--fraction has an effect only with --verify"),
    ],
)
def test_options_that_do_not_fit(words: list[object], why: str, smoke_bundle: Path, tmp_path: Path) -> None:
    result = sample(smoke_bundle, tmp_path / "out", *words)
    assert result.returncode == 2
    assert why in result.stderr


def test_an_older_manifest_is_read() -> None:
    job = make("m", "d", "exact", count=5, kind="npy")
    older = {key: value for key, value in vars(job).items() if key not in ("arithmetic", "shard", "encoding")}
    assert from_json(json.dumps(older).encode()) == job


def test_jobs_in_one_object_store_have_names_of_their_own() -> None:
    def names(**changes: Any) -> set[str]:
        job: Job = make("m", **{"digest": "d", "arithmetic": "exact", "count": 5, "kind": "parquet", **changes})
        return {job.file(number).name for number in range(job.files)}

    others = [{"digest": "e"}, {"arithmetic": "bfloat16"}, {"seed": 1}, {"temperature": 0.5}, {"encoding": "webp"}]
    found = [names(), *(names(**changes) for changes in others)]
    assert len(set.union(*found)) == len(found)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket in an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_EC2_METADATA_DISABLED": "true"}
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        pytest.importorskip("boto3").client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="pictures")
        yield f"s3://pictures/PATH?endpoint_override={host}:{port}&scheme=http"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@pytest.mark.parametrize("kind", ["png", *SHARDED])
def test_an_object_store_holds_what_a_folder_does(kind: str, bucket: str, smoke_bundle: Path, tmp_path: Path) -> None:
    place = bucket.replace("PATH", f"a/{kind}")
    words = ["--format", kind, *(["--shard", 30] if kind != "png" else [])]
    result = sample(smoke_bundle, place, *words)
    assert result.returncode == 0, result.stderr
    sample(smoke_bundle, tmp_path / "folder", *words)
    store = open_store(place)
    assert {name: store.read(name) for name in store.walk()} == contents(tmp_path / "folder")
    assert "0 made" in sample(smoke_bundle, place, *words).stdout
    assert "50 made" in sample(smoke_bundle, place, *words, n=150).stdout or kind != "png"
    assert verify(smoke_bundle, place, "--fraction", 1).returncode == 0
    assert_clear_error(sample(smoke_bundle, place, *words, "--seed", 1), "another job's files")


def test_an_object_that_was_cut_is_made_again(bucket: str, smoke_bundle: Path) -> None:
    place = bucket.replace("PATH", "cut")
    words = ["--format", "parquet", "--shard", 50]
    sample(smoke_bundle, place, *words)
    store = open_store(place)
    name = min(name for name in store.walk() if name.endswith(".parquet"))
    good = store.read(name)
    assert good is not None
    store.put(name, good[:-10])
    assert_clear_error(verify(smoke_bundle, place, "--fraction", 1), "other pictures: 1 of", name)
    assert "50 made" in sample(smoke_bundle, place, *words).stdout
    assert store.read(name) == good


def test_a_store_that_does_not_answer_is_one_line(smoke_bundle: Path) -> None:
    place = "s3://pictures/a?endpoint_override=127.0.0.1:1&scheme=http&connect_timeout=1&request_timeout=1"
    assert_clear_error(sample(smoke_bundle, place, "--format", "npy"), "cannot", "s3://pictures/a")
    assert_clear_error(sample(smoke_bundle, "nowhere://x", "--format", "npy"), "nowhere://x")
    assert_clear_error(sample(smoke_bundle, "file:///tmp/x", "--format", "npy"), "named by its path alone")
