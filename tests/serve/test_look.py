"""A look at a model in the shell: the way between two samples, temperatures, and pictures in a terminal."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve import Engine, load, sample_cli
from serve.encoding import contact_sheet, encode
from serve.model import MOST_TEMPERATURE, Images
from serve.noise import INDICES, between, draw
from serve.server.http import routes
from tests.conftest import BIN, assert_clear_error, command, inside, serving
from tests.serve.test_bulk import contents
from tests.test_commands import LIGHT

LAST = 2**63 - 1


@pytest.fixture(scope="module")
def engine(smoke_bundle: Path) -> Engine:
    return Engine(load(smoke_bundle))


@pytest.fixture(scope="module")
def faces() -> Engine:
    """The embedded model, whose pictures differ more than those of a run of seconds."""
    return Engine(load())


def look(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return command("sample-cli", *words, **environment)


def arrays(folder: Path, pattern: str) -> Images:
    paths = sorted(folder.glob(pattern))
    assert paths
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def frames(path: Path) -> list[Images]:
    with Image.open(path) as opened:
        found = []
        for number in range(opened.n_frames):
            opened.seek(number)
            found.append(np.asarray(opened.convert("RGB")))
        return found


def way(engine: Engine, seed: int, a: int, b: int, steps: int, temperature: float = 1.0) -> Images:
    """What HTTP gives at /between/SEED/A/B/FRAME.png, which tests/serve/test_http.py holds to the same."""
    size = engine.card.noise_size
    return engine.decode(between(*(draw(seed, i, 1, size)[0] for i in (a, b)), steps) * np.float32(temperature))


def test_a_way_leads_from_one_sample_to_another(smoke_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    out, ends = tmp_path / "way", tmp_path / "ends"
    words = ("--model", smoke_bundle, "--seed", 7, "--interpolate", 3, 9, "--steps", 24, "--out", f"{out}/")
    result = look(*words)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"24 made: {out}/, best seen in {out}/way.webp\n"
    assert sorted(contents(out)) == [*(f"{n:03d}.png" for n in range(24)), "manifest.json", "way.webp"]
    expected = way(engine, 7, 3, 9, 24)
    np.testing.assert_array_equal(arrays(out, "*.png"), expected)

    assert look("--model", smoke_bundle, "--seed", 7, "--start", 3, "--n", 7, "--out", ends).returncode == 0
    for frame, index in ((0, 3), (23, 9)):
        assert (out / f"{frame:03d}.png").read_bytes() == (ends / f"{index:09d}.png").read_bytes()
    there_and_back = [*expected, *expected[-2:0:-1]]
    np.testing.assert_array_equal(frames(out / "way.webp"), there_and_back)


@pytest.fixture(scope="module")
def doors(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server's address, and the URL of its HTTP side."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving("--model", smoke_bundle, "--http", "127.0.0.1:0", log=log) as (address, _):
        yield address, re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[0]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_a_way_of_any_seed_indices_temperature_and_format_is_what_servers_give(
    kind: str, smoke_bundle: Path, engine: Engine, doors: tuple[str, str], tmp_path: Path
) -> None:
    server, url = doors
    words = ("--seed", 2**64 - 1, "--interpolate", LAST, 0, "--temperature", 0.7, "--format", kind)
    for name, where in (("here", ("--model", smoke_bundle)), ("there", ("--server", server))):
        result = look(*where, *words, "--json", "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["made"] == routes.STEPS.default == 30
    here, there = (contents(tmp_path / name) for name in ("here", "there"))
    del here["manifest.json"], there["manifest.json"]  # which has the name that a server gives to the model
    assert here == there
    ending = {"webp": "webp", "jpeg": "jpg"}[kind]
    expected = way(engine, 2**64 - 1, LAST, 0, 30, 0.7)
    assert [here[f"{n:03d}.{ending}"] for n in range(30)] == [encode(image, kind) for image in expected]

    def by_http(tail: str) -> bytes:
        address = f"{url}/v1/models/smoke/between/{2**64 - 1}/{LAST}/0{tail}?temperature=0.7"
        with urllib.request.urlopen(address, timeout=60) as reply:
            return bytes(reply.read())

    assert here[f"008.{ending}"] == by_http(f"/8.{kind}")
    assert here["way.webp"] == by_http(".webp")


def test_limits_are_those_of_http() -> None:
    options: dict[str, Any] = {each.name: each for each in sample_cli.main.params}
    schema = routes.STEPS.schema
    steps = options["steps"]
    assert (steps.type.min, steps.type.max, steps.default) == (schema["minimum"], schema["maximum"], 30)
    assert options["interpolate"].type.max == INDICES - 1
    assert options["temperature"].type.max == MOST_TEMPERATURE


def test_the_same_samples_at_several_temperatures(smoke_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    out, plain = tmp_path / "warm", tmp_path / "plain"
    words = ("--model", smoke_bundle, "--seed", 7, "--start", 9_995, "--n", 10)
    result = look(*words, "--temperatures", ".5,.7,1", "--out", out)
    assert result.returncode == 0, result.stderr
    assert f"best seen in {out}/temperatures.png" in result.stdout
    found = contents(out)
    rows = [engine.sample(7, 9_995, 10, temperature) for temperature in (0.5, 0.7, 1.0)]
    for name, temperature in (("0.5", 0.5), ("0.7", 0.7), ("1", 1)):
        assert look(*words, "--temperature", temperature, "--out", plain / name).returncode == 0
        expected = contents(plain / name)
        del expected["manifest.json"]
        assert {file[len(name) + 1 :]: found.pop(file) for file in [*found] if file.startswith(f"{name}/")} == expected
    assert found.pop("temperatures.png") == contact_sheet(np.concatenate(rows), 10)
    assert sorted(found) == ["manifest.json", "temperatures.webp"]
    moving = frames(out / "temperatures.webp")
    assert len(moving) == 4  # .5, .7, 1 and back over .7
    height, width, _ = engine.card.image_shape
    for frame, row in zip(moving, [*rows, rows[1]], strict=True):
        assert frame.shape == (2 * height, 8 * width, 3)
        np.testing.assert_array_equal(frame[:height, :width], row[0])
        np.testing.assert_array_equal(frame[height:, width : 2 * width], row[9])


def test_a_folder_is_one_jobs(smoke_bundle: Path, tmp_path: Path) -> None:
    way, plain = tmp_path / "way", tmp_path / "plain"
    model = ("--model", smoke_bundle)
    words = (*model, "--interpolate", 3, 9, "--steps", 4)
    assert look(*words, "--out", way).returncode == 0
    first = contents(way)
    (way / "002.png").write_bytes(b"")
    (way / ".part-0123abcd-003.png").write_bytes(b"half-written")
    assert look(*words, "--out", way).returncode == 0
    assert contents(way) == first

    assert_clear_error(look(*words, "--temperature", 0.5, "--out", way), "(temperature 1.0, not 0.5)", "--mix")
    warm = (*model, "--n", 2, "--temperatures", "1,2")
    assert_clear_error(look(*warm, "--out", way), "(sweep interpolation, not temperatures)", "--mix")
    assert_clear_error(look(*model, "--n", 2, "--out", way), "not of a range of samples", "--mix")
    assert_clear_error(look(*model, "--verify", way), "not of a range of samples")
    assert contents(way) == first

    assert look(*model, "--n", 2, "--out", plain).returncode == 0
    assert_clear_error(look(*words, "--out", plain), "another job's files", "--mix")
    (plain / "manifest.json").write_bytes(b"[1]")
    assert_clear_error(look(*words, "--out", plain), "damaged", "--mix")
    (plain / "manifest.json").unlink()
    assert_clear_error(look(*words, "--out", plain), "holds files that are not of a job", "--mix")
    assert look(*words, "--mix", "--out", plain).returncode == 0
    assert contents(plain).items() > first.items()


WAY, WARM = ("--interpolate", 3, 9), ("--n", 2, "--temperatures", ".5,1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*WAY, "--n", 5), "--n has an effect only without --interpolate"),
        ((*WAY, "--start", 5), "--start has an effect only without --interpolate"),
        ((*WAY, *WARM[2:]), "--temperatures has an effect only without --interpolate"),
        ((*WARM, "--temperature", 0.5), "--temperature has an effect only without --temperatures"),
        ((*WARM, "--steps", 5), "--steps has an effect only with --interpolate"),
        ((*WAY, "--grid"), "--grid has an effect only without --interpolate and --temperatures"),
        ((*WARM, "--part", "0/2"), "--part has an effect only without --interpolate and --temperatures"),
        ((*WAY, "--format", "parquet"), "--format png, jpeg or webp. Received: --format parquet"),
        ((*WARM, "--out", "-"), "Received: --out -"),
        ((*WAY, "--steps", 1), "--steps"),
        ((*WAY, "--steps", 257), "--steps"),
        (("--interpolate", 3), "--interpolate"),
        (("--interpolate", 3, LAST + 1), "--interpolate"),
        (WARM[2:], "expected --n"),
        ((*WARM[2:], "--n", 65), "--n is 64 at most with --temperatures. Received: 65"),
        *(
            (("--n", 2, "--temperatures", each), "2 to 16 different numbers from 0 to 100")
            for each in (".5", ".5,.50", ".5,", ".5,nan", ".5,101", "-1,1", "a,b", ",".join(map(str, range(17))))
        ),
        (("--verify", "x", "--show"), "--show has an effect only without --verify"),
        (("--n", 2, "--show", "--out", "-"), "--show has an effect only where --out is no pipe"),
        (("--n", 2, "--show", "--json"), "expected --show or --json"),
        (("--n", 2, "--show", "--out", ""), "--show takes a terminal"),
        (("--n", 2, "--show", "--out", "", "--format", "webp"), "--format has an effect only with --out"),
    ],
)
def test_a_wrong_way_is_one_line(words: tuple[object, ...], said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_clear_error(inside("sample-cli", *(() if "--verify" in words else ("--out", out)), *words), said, code=2)
    assert not out.exists()


def test_stopped_it_says_so_in_one_line(tmp_path: Path) -> None:
    words = ("--server", "127.0.0.1:1", "--wait", 60, *WAY, "--out", tmp_path / "way")

    def as_in_a_terminal() -> None:  # a shell starts background jobs, and so their tests, deaf to SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        [BIN / "sample-cli", *map(str, words)], stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    ) as process:
        assert process.stderr is not None
        assert "waiting" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == f"stopped; the same command completes {tmp_path / 'way'}\n"
    assert process.returncode == 130


def terminal(
    words: Sequence[object], answers: dict[bytes, bytes] | None = None, size: tuple[int, int] = (24, 80), **more: str
) -> tuple[int, bytes]:
    """Run a command in a pseudo-terminal that answers what it is asked; return its exit code and what it wrote."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **more}
    said = b""
    with subprocess.Popen([*map(str, words)], stdin=its, stdout=its, stderr=its, env=environment) as process:
        os.close(its)
        left = dict(answers or {})
        while True:
            try:
                said += os.read(ours, 2**16)
            except OSError:  # it was closed
                break
            for asked in [each for each in left if re.search(each, said)]:
                os.write(ours, left.pop(asked))
    os.close(ours)
    return process.returncode, said


BLOCK = re.compile(rb"(?:\x1b\[([\d;]*)m)?((?:\xe2\x96\x80)+)|(\n)")


def pixels(said: bytes) -> Images:
    """What half blocks in true colours show: uint8 [2 * lines, columns, 3]."""
    lines, colours = [[]], [(0, 0, 0), (0, 0, 0)]
    for style, blocks, end in BLOCK.findall(said):
        if end:
            lines.append([])
            continue
        for where, *rgb in re.findall(rb"([34])8;2;(\d+);(\d+);(\d+)", style):
            colours[int(where) - 3] = tuple(map(int, rgb))
        lines[-1] += [tuple(colours)] * (len(blocks) // 3)
    widest = max(map(len, lines))
    black = ((0, 0, 0), (0, 0, 0))
    full = [line + [black] * (widest - len(line)) for line in lines if line]
    drawn = np.array(full, np.uint8)  # [lines, columns, 2, 3]
    return drawn.transpose(0, 2, 1, 3).reshape(2 * len(drawn), -1, 3)


def near(drawn: Images, images: Images) -> None:
    """Assert that a row of images was drawn, at whatever size."""
    height, width = drawn.shape[:2]
    parts = np.split(drawn, len(images), axis=1)
    for part, image in zip(parts, images, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((width // len(images), height)))
        assert np.abs(part.astype(int) - expected).mean() < 6
        assert np.abs(part.astype(int) - expected[:, ::-1]).mean() > 10  # faces are not symmetric


def test_a_terminal_shows_the_pictures_in_half_blocks(faces: Engine, tmp_path: Path) -> None:
    command = (BIN / "sample-cli", "--seed", 7, "--n", 7, "--show")
    code, said = terminal(command)
    assert code == 0, said
    drawn, images = pixels(said), faces.sample(7, 0, 7)
    assert drawn.shape == (2 * 20, 4 * 20, 3)  # in all of 80 columns
    near(drawn[:20], images[:4])
    near(drawn[20:, :60], images[4:])
    assert said.count(b"\n") < 24

    code, said = terminal((*command, "--out", tmp_path / "out", "--quiet"))
    assert code == 0, said
    assert pixels(said).shape == drawn.shape
    assert len(list((tmp_path / "out").glob("*.png"))) == 7  # and no sheet


def test_a_terminal_shows_ways_and_temperatures(faces: Engine, tmp_path: Path) -> None:
    command = (BIN / "sample-cli", "--seed", 7, "--show")
    code, said = terminal((*command, "--interpolate", 3, 9, "--steps", 4))
    assert code == 0, said
    near(pixels(said), way(faces, 7, 3, 9, 4))
    code, said = terminal((*command, "--n", 3, "--temperatures", ".5,1", "--out", tmp_path / "warm"))
    assert code == 0, said
    assert (tmp_path / "warm" / "temperatures.webp").exists()
    headings = re.findall(rb"temperature [\d.]+", said)
    assert headings == [b"temperature 0.5", b"temperature 1"]
    for part, temperature in zip(said.split(b"temperature ")[1:], (0.5, 1.0), strict=True):
        near(pixels(part), faces.sample(7, 0, 3, temperature))


def test_a_terminal_with_graphics_shows_pixels(faces: Engine) -> None:
    command = (BIN / "sample-cli", "--seed", 7, "--n", 4, "--show")
    code, said = terminal(command, {rb"\x1b\[c": b"\x1b[?62;4c"})
    assert code == 0, said
    assert re.search(rb'\x1bP[\d;]*q"1;1;', said)  # Sixel

    answers = {rb"\x1b\[c": b"\x1b[?62c", rb"a=q": b"\x1b_Gi=1;OK\x1b\\"}
    code, said = terminal(command, answers, TERM="xterm-kitty")
    assert code == 0, said
    png = b"".join(re.findall(rb"\x1b_Gi=\d+,m=\d,f=100,q=2;(.*?)\x1b\\", said, re.DOTALL))
    near(np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))), faces.sample(7, 0, 4))


def test_where_there_is_no_terminal_it_says_where_the_file_is(smoke_bundle: Path, tmp_path: Path) -> None:
    command = ("--model", smoke_bundle, "--n", 3, "--show", "--out", tmp_path / "out")
    result = look(*command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:] == [f"contact sheet: {tmp_path}/out/grid.png"]
    assert (tmp_path / "out" / "grid.png").exists()
    result = look("--model", smoke_bundle, *WAY, "--show", "--out", tmp_path / "way")
    assert result.stdout == f"30 made: {tmp_path}/way, best seen in {tmp_path}/way/way.webp\n"
    for size, term in (((0, 0), "xterm"), ((24, 80), "dumb")):
        code, said = terminal((BIN / "sample-cli", *command), size=size, TERM=term)
        assert code == 0, said
        assert said.splitlines()[1:] == [f"contact sheet: {tmp_path}/out/grid.png".encode()]


def test_without_the_library_one_line_says_how_to_get_it(smoke_bundle: Path, tmp_path: Path) -> None:
    start = (sys.executable, "-c", LIGHT, '["textual_image"]', "serve.sample_cli", "--model", smoke_bundle)
    for more in (("--n", 3), ("--n", 3, "--out", tmp_path / "out"), WAY):
        code, said = terminal((*start, *more, "--show"))
        assert code == 1
        assert said == b"Error: --show takes pip install '.[show]' in the checkout, or textual-image\r\n"
    assert not (tmp_path / "out").exists()
