"""Pictures of every kind become arrays, or one line that says why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.encoding import contact_sheet
from tests.conftest import assert_clear_error, draw_faces, inside
from training.data import images as decoding
from training.data.dataset import load_data
from training.errors import DataError
from training.recipes import recipe

SMOKE = recipe("smoke")


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a user's cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".xdg"))


def only(folder: Path, picture: Image.Image, name: str) -> np.ndarray:
    """Two copies of a picture as the smoke recipe reads them; the first."""
    folder.mkdir()
    picture.save(folder / f"a-{name}")
    picture.save(folder / f"b-{name}")
    images = load_data(folder, SMOKE).train.images
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    return images[0]


def test_formats_sizes_and_folders_may_be_mixed(tmp_path: Path) -> None:
    for index, (ending, size) in enumerate(
        [("png", (300, 20)), ("jpg", (16, 16)), ("webp", (17, 99)), ("bmp", (64, 64))]
    ):
        folder = tmp_path / str(index) / "deep"
        folder.mkdir(parents=True)
        Image.new("RGB", size, (200, 100, 50)).save(folder / f"x.{ending}")
    (tmp_path / "labels.csv").write_text("not a picture by its name")
    dataset = load_data(tmp_path, SMOKE).train
    assert (dataset.report.read, len(dataset.report.ignored), dataset.report.broken) == (4, 1, [])
    assert np.abs(dataset.images.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize(
    ("mode", "value", "wanted"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),  # what is transparent is paper
        ("I;16", 25700, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes_become_eight_bit_colour(tmp_path: Path, mode: str, value: object, wanted: tuple[int, ...]) -> None:
    pixels = only(tmp_path / "x", Image.new(mode, (20, 20), value), "x.png")
    assert np.abs(pixels.astype(int) - wanted).max() <= 1


def test_cmyk_becomes_colour(tmp_path: Path) -> None:
    pixels = only(tmp_path / "x", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "x.jpg")
    assert pixels[0, 0, 0] > 200
    assert pixels[0, 0, 1] < 60


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by a quarter to see it upright
    for name in "ab":
        picture.save(tmp_path / f"{name}.png", exif=exif)
    upright = load_data(tmp_path, SMOKE).train.images[0]
    assert upright[:, 15].min() > 200
    assert upright[:, 0].max() < 50


def test_the_crop_is_the_papers(tmp_path: Path) -> None:
    celeba = recipe("celeba")
    picture = np.zeros((218, 178, 3), np.uint8)
    picture[45:173, 25:153] = 255
    for name in "ab":
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    images = load_data(tmp_path, celeba).train.images
    assert images.shape == (2, 64, 64, 3)
    assert images.min() == 255
    Image.new("RGB", (100, 100)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match="smaller than the recipe's crop"):
        load_data(tmp_path, celeba)


def bomb(path: Path) -> None:
    """A hundred megapixels in a small file."""
    Image.new("1", (10_000, 10_000)).save(path)


def truncated(path: Path) -> None:
    whole = path.with_name("whole.png")
    Image.effect_noise((64, 64), 50).save(whole)
    path.write_bytes(whole.read_bytes()[:900])
    whole.unlink()


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "not a picture": lambda path: path.write_text("hello"),
    "truncated": truncated,
    "megapixels": bomb,
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_picture_stops_training_before_it_begins(reason: str, tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 3)
    BROKEN[reason](data / "999.png")
    result = inside("train-vae", "--recipe", "smoke", "--data", data, "--out", tmp_path / "run")
    assert_clear_error(result, "999.png", reason, "--skip-unreadable")
    assert not (tmp_path / "run").exists()
    dataset = load_data(data, SMOKE, skip_unreadable=True).train
    assert len(dataset) == 3
    assert [name for name, _ in dataset.report.broken] == [str(data / "999.png")]


def test_what_is_ignored_is_named_by_kind_of_reason(tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 3)
    for name in ("a.txt", "b.csv", "c.json", "d.toml", ".DS_Store"):
        (data / name).write_text("x")
    said = str(load_data(data, SMOKE).train.report)
    assert said == (
        "3 train; 0 broken, 5 ignored (hidden: .DS_Store; no picture by the ending: a.txt, b.csv, c.json and 1 more)"
    )


def test_folders_that_are_linked_are_read_once_and_hidden_ones_are_not(tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 3)
    draw_faces(data / ".Trash-1000" / "files", 1)
    (data / "linked").symlink_to(draw_faces(tmp_path / "elsewhere", 5))
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "round").symlink_to(data)
    for name in ("figure.eps", "model.h5"):  # Pillow knows what these are
        (data / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0" if name.endswith("eps") else b"\x89HDF\r\n\x1a\n")
    said = str(load_data(data, SMOKE).train.report)
    assert said.startswith("8 train; 0 broken, 3 ignored (")
    assert "hidden: .Trash-1000/files/000.png" in said


@pytest.fixture
def sheets(tmp_path: Path) -> list[Path]:
    """What sample-cli and train-vae write beside single pictures."""
    from training.record import grids, plots

    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    made = [tmp_path / "made" / name for name in ("grid.png", "stage1-0001.png", "figure5.png")]
    grids.grid(made[1], pictures)
    plots.variances(made[2], np.linspace(0, 1, 8))
    made[0].write_bytes(contact_sheet(pictures, 2))
    return made


@pytest.mark.parametrize("zipped", [False, True])
def test_our_own_sheets_are_no_training_pictures(zipped: bool, sheets: list[Path], tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 6)
    alone = load_data(data, SMOKE).train
    for sheet in sheets:
        shutil.copy(sheet, data / f"000-{sheet.name}")  # among the first, where a limit counts
    source = Path(shutil.make_archive(str(tmp_path / "x"), "zip", data)) if zipped else data
    for _ in range(2):  # the second time from what is remembered
        dataset = load_data(source, SMOKE).train
        assert np.array_equal(dataset.images, alone.images)
        few = load_data(source, SMOKE.set(["limit=4"])).train
        assert np.array_equal(few.images, alone.images[:4])
    said = "6 train; 0 broken, 3 ignored (made by sample-cli or train-vae: 000-figure5.png, 000-grid.png, 000-stage1"
    assert str(dataset.report).startswith(said)


def test_a_folder_of_sheets_alone_says_so(sheets: list[Path]) -> None:
    with pytest.raises(DataError, match=r"2 pictures or more\. Received: .* no pictures; .*made by sample-cli"):
        load_data(sheets[0].parent, SMOKE)


def test_heic_takes_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_endings", lambda: {".png"})  # as without pillow-heif
    data = tmp_path / "data"
    data.mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.heif"):
        (data / name).write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        DataError, match=r"none a picture .*; IMG_1.HEIC is HEIC, .* the extra heif \(pip install pillow-he"
    ):
        load_data(data, SMOKE)
    draw_faces(data, 2)
    said = str(load_data(data, SMOKE).train.report)
    assert "2 ignored (HEIC, which takes the extra heif (pip install pillow-heif): IMG_1.HEIC, IMG_2.heif)" in said


def test_heic_is_read_with_that_extra(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="needs the extra heif")
    pixels = only(tmp_path / "x", Image.new("RGB", (64, 64), (200, 100, 50)), "x.heic")
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 6


def test_folders_without_pictures(tmp_path: Path) -> None:
    def train(data: Path) -> object:
        return inside("train-vae", "--recipe", "smoke", "--data", data, "--out", tmp_path / "run")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert_clear_error(train(empty), "holds no files")
    (empty / "notes.txt").write_text("x")
    assert_clear_error(train(empty), "none a picture")
    assert_clear_error(train(tmp_path / "absent"), "does not exist")
    assert_clear_error(train(draw_faces(tmp_path / "one", 1)), "2 pictures or more")
    assert not (tmp_path / "run").exists()


def test_cifar10s_binary_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    rows = np.concatenate(
        [np.arange(20, dtype=np.uint8)[:, None] % 10, images.transpose(0, 3, 1, 2).reshape(20, -1)], 1
    )
    rows[:10].tofile(tmp_path / "data_batch_1.bin")
    rows[10:].tofile(tmp_path / "data_batch_2.bin")
    rows.tofile(tmp_path / "test_batch.bin")
    assert np.array_equal(load_data(tmp_path, recipe("cifar10")).train.images, images)
    with pytest.raises(DataError, match="--recipe cifar10"):
        load_data(tmp_path, SMOKE)
    with pytest.raises(DataError, match=r"recipe rae-gp-celeba wants 64x64 .*: pass --recipe rae-gp-cifar10$"):
        load_data(tmp_path, recipe("rae-gp-celeba"))
    with (tmp_path / "data_batch_2.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="no multiple of 3073"):
        load_data(tmp_path, recipe("cifar10"))
