"""Everything --data may be, and its splits."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import draw_faces
from training.data.dataset import Dataset, Splits, load_data
from training.data.splits import Report
from training.errors import DataError
from training.recipes import recipe

SMOKE = recipe("smoke")
CELEBA = recipe("celeba")

pytestmark = pytest.mark.usefixtures("user_cache")


def counts(splits: Splits) -> list[int]:
    return [len(split) if split else 0 for split in (splits.train, splits.validation, splits.test)]


def same(one: Splits, two: Splits) -> bool:
    pairs = [(getattr(one, split), getattr(two, split)) for split in ("train", "validation", "test")]
    return one.train.report == two.train.report and all(
        a is b is None or (np.array_equal(a.images, b.images) and a.digest == b.digest) for a, b in pairs
    )


def pack(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))
    return archive


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


# CelebA


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Twelve pictures as CelebA's are: their size, their names, their folder."""
    drawn = draw_faces(tmp_path / "drawn", 12, (178, 218))
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(drawn.iterdir()), 1):
        Image.open(path).save(folder / f"{number:06d}.jpg")
    return folder.parent


OFFICIAL = "".join(f"{number:06d}.jpg {0 if number <= 6 else 1 if number <= 10 else 2}\n" for number in range(1, 13))


@pytest.mark.parametrize("where", ["inside", "beside", "in the zip", "beside the zip", "csv"])
def test_celebas_official_split(where: str, celeba: Path, tmp_path: Path) -> None:
    whole = load_data(celeba, CELEBA)
    assert (whole.train.report.kind, counts(whole)) == ("pictures", [12, 0, 0])
    partition = celeba / "list_eval_partition.txt"
    partition.write_text(OFFICIAL)
    data = celeba
    if where == "beside":
        data = celeba / "img_align_celeba"
    elif where == "in the zip":
        data = pack(celeba, tmp_path / "celeba.zip")
    elif where == "beside the zip":
        data = pack(celeba / "img_align_celeba", celeba / "img_align_celeba.zip")
    elif where == "csv":
        partition.unlink()
        (celeba / "list_eval_partition.csv").write_text("image_id,partition\n" + OFFICIAL.replace(" ", ","))
    splits = load_data(data, CELEBA)
    assert (splits.train.report.kind, counts(splits)) == ("CelebA", [6, 4, 2])
    assert str(splits.train.report) == "6 train, 4 validation, 2 test; 0 broken, 0 ignored"
    parts = [split.images for split in (splits.train, splits.validation, splits.test) if split]
    assert np.array_equal(np.concatenate(parts), whole.train.images)
    assert counts(load_data(data, replace(CELEBA, limit=3))) == [3, 4, 2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (OFFICIAL.replace("000003.jpg 0", "000003.jpg"), r"partition.txt, line 3: expected .* Received: '000003.jpg'"),
        (OFFICIAL.replace("000004.jpg 0", "000004.jpg 3"), r"line 4: expected .*0 \(train\), 1 .*Received: .*jpg 3'"),
        (OFFICIAL.replace("000004.jpg 0", "000004.jpg 0 1"), "line 4: expected"),
        ("\ufffd\x00" + OFFICIAL[12:], "line 1: expected"),
        ("\ufeff" + OFFICIAL + "x", "line 13: expected"),
        (OFFICIAL + "000001.jpg 2\n", "line 13: 000001.jpg is in another split already"),
        (OFFICIAL.replace("0000", "x"), r"partition.txt names none of the 12 pictures; .* lack is .*000001.jpg"),
        (OFFICIAL.replace("000012", "x"), r"names only 11 of the 12 pictures; .* lack is .*000012.jpg"),
        ("", "names none of the 12 pictures"),
    ],
)
def test_a_wrong_partition_is_one_clear_error(text: str, wanted: str, celeba: Path) -> None:
    (celeba / "list_eval_partition.txt").write_text(text)
    with pytest.raises(DataError, match=wanted):
        load_data(celeba, CELEBA)


def test_a_partition_beside_other_pictures_is_not_theirs(tmp_path: Path) -> None:
    (tmp_path / "list_eval_partition.txt").write_text(OFFICIAL)
    assert counts(load_data(draw_faces(tmp_path / "mine", 5), SMOKE)) == [5, 0, 0]


# Arrays


def save_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(">IIII", 0x0803, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("ending", ["-idx3-ubyte", "-idx3-ubyte.gz", ".idx3-ubyte"])
def test_idx_files(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "mnist" / "raw"
    folder.mkdir(parents=True)
    digits = images(30, 28, 28)
    save_idx(folder / f"train-images{ending}", digits[:20])
    save_idx(folder / f"t10k-images{ending}", digits[20:])
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    grey = replace(SMOKE, side=32, channels=1)
    splits = load_data(tmp_path / "mnist", grey)
    assert counts(splits) == [20, 0, 10]
    assert splits.train.images.shape == (20, 32, 32, 1)
    wanted = [np.asarray(Image.fromarray(digit).resize((32, 32), Image.Resampling.BILINEAR)) for digit in digits]
    parts = [splits.train.images, splits.test.images]
    assert np.array_equal(np.concatenate(parts)[..., 0], wanted)
    colour = load_data(tmp_path / "mnist", replace(grey, channels=3)).train.images
    assert np.array_equal(colour, np.repeat(splits.train.images, 3, axis=3))
    assert not list((tmp_path / "xdg").rglob(".part-*"))


def test_damaged_idx_files(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    save_idx(file, images(20, 28, 28))
    whole = file.read_bytes()
    for data, wanted in (
        (whole[:-1], "is not whole: 15695 bytes do not make 20 pictures of 28x28"),
        (b"\0\0\x08\x01" + whole[4:], "is not an IDX file of pictures: it begins with 00000801"),
        (b"", "begins with nothing"),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError, match=wanted):
            load_data(tmp_path, SMOKE)
    file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-100])
    with pytest.raises(DataError, match=r"cannot read .*train-images-idx3-ubyte.gz"):
        load_data(tmp_path, SMOKE)


def test_an_npy_that_fits_is_mapped_as_it_lies(tmp_path: Path, user_cache: Path) -> None:
    pictures = images(40, 16, 16, 3)
    np.save(tmp_path / "x.npy", pictures)
    splits = load_data(tmp_path / "x.npy", SMOKE)
    assert isinstance(splits.train.images, np.memmap)
    assert np.array_equal(splits.train.images, pictures)
    assert not list(user_cache.glob("*.pictures"))
    assert splits.train.digest == Dataset(pictures, False, Report()).digest
    few = load_data(tmp_path / "x.npy", replace(SMOKE, limit=7))
    assert np.array_equal(few.train.images, pictures[:7])
    assert few.train.digest == Dataset(pictures[:7], False, Report()).digest
    np.save(tmp_path / "x.npy", pictures[::-1])
    assert load_data(tmp_path / "x.npy", SMOKE).train.digest == Dataset(pictures[::-1], False, Report()).digest


@pytest.mark.parametrize("shape", [(24, 24), (24, 24, 1), (20, 30, 3), (24, 24, 4), (16, 16)])
def test_other_arrays_are_made_to_fit(shape: tuple[int, ...], tmp_path: Path) -> None:
    pictures = images(10, *shape)
    np.save(tmp_path / "x.npy", pictures)
    (tmp_path / "files").mkdir()
    for index, picture in enumerate(pictures):
        flat = picture[..., 0] if shape[-1] == 1 else picture
        Image.fromarray(flat).save(tmp_path / "files" / f"{index}.png")
    arrays, files = load_data(tmp_path / "x.npy", SMOKE), load_data(tmp_path / "files", SMOKE)
    assert np.array_equal(arrays.train.images, files.train.images)
    assert arrays.train.digest == files.train.digest


def test_npz_files(tmp_path: Path) -> None:
    pictures = images(30, 16, 16, 3)
    labels = np.arange(30)
    for names, wanted in (
        ({"anything": pictures}, [30, 0, 0]),
        ({"labels": labels, "images": pictures}, [30, 0, 0]),
        ({"x_train": pictures[:20], "y_train": labels, "x_test": pictures[20:]}, [20, 0, 10]),
        ({"train_images": pictures[:20], "val_images": pictures[20:26], "test_images": pictures[26:]}, [20, 6, 4]),
    ):
        np.savez_compressed(tmp_path / "x.npz", allow_pickle=False, **names)
        splits = load_data(tmp_path / "x.npz", SMOKE)
        assert counts(splits) == wanted
        parts = [split.images for split in (splits.train, splits.validation, splits.test) if split]
        assert np.array_equal(np.concatenate(parts), pictures)
    np.savez(tmp_path / "x.npz", allow_pickle=False, one=pictures, two=pictures)
    with pytest.raises(DataError, match=r"holds 2 arrays \(one, two\): call the one of pictures 'images'"):
        load_data(tmp_path / "x.npz", SMOKE)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_arrays_of_something_else_are_refused(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{ending}"
    for array, wanted in (
        (np.zeros((5, 16, 16, 3), np.float32), r"scale floats to 0-255 .* Received: float32 \[5, 16, 16, 3\]"),
        (np.zeros((5, 16, 16, 3), np.int64), "pictures are uint8"),
        (np.zeros((5, 16), np.uint8), r"Received: uint8 \[5, 16\]"),
        (np.zeros((5, 3, 16, 16), np.uint8), r"Received: uint8 \[5, 3, 16, 16\]"),
        (np.zeros((0, 16, 16), np.uint8), r"Received: uint8 \[0, 16, 16\]"),
        (np.zeros((1, 16, 16), np.uint8), "2 pictures or more"),
        (np.array([Trap(tmp_path / "sprung")] * 5), "Python objects"),
    ):
        (np.save if ending == ".npy" else np.savez)(file, array, allow_pickle=True)
        with pytest.raises(DataError, match=wanted):
            load_data(file, SMOKE)
    np.save(file.open("wb"), images(5, 16, 16, 3))
    for damaged in (pickle.dumps(Trap(tmp_path / "sprung")), b"", file.read_bytes()[:300]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot read"):
            load_data(file, SMOKE)
    assert not (tmp_path / "sprung").exists()


# Zips


def test_a_zip_is_its_folder(pictures: Path, tmp_path: Path) -> None:
    folder, archive = load_data(pictures, SMOKE), load_data(pack(pictures, tmp_path / "x.zip"), SMOKE)
    assert same(folder, archive)


def test_a_zip_may_be_hostile(tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 3)
    picture = (data / "000.png").read_bytes()
    with zipfile.ZipFile(pack(data, tmp_path / "x.zip"), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.png", picture)
        archive.writestr("/absolute.png", picture)
        archive.writestr("notes.txt", "x")
        with archive.open("zeros.png", "w") as member:
            for _ in range(257):
                member.write(bytes(2**20))
    before = {path for path in tmp_path.rglob("*") if "xdg" not in path.parts}
    with pytest.raises(DataError, match=r"x.zip/zeros.png: the file is over 256 MB; mend it"):
        load_data(tmp_path / "x.zip", SMOKE)
    splits = load_data(tmp_path / "x.zip", SMOKE, skip_unreadable=True)
    report = splits.train.report
    assert (report.read, report.ignored, report.counts) == (
        5,
        [("notes.txt", "no picture by the ending")],
        {"train": 5},
    )
    assert [Path(name).name for name, _ in report.broken] == ["zeros.png"]
    assert {path for path in tmp_path.rglob("*") if "xdg" not in path.parts} == before


def test_damaged_zips(tmp_path: Path) -> None:
    data = draw_faces(tmp_path / "data", 5)
    whole = pack(data, tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cannot read .*x.zip"):
        load_data(tmp_path / "x.zip", SMOKE)
    (tmp_path / "x.zip").write_bytes(whole[:100] + b"????" + whole[104:])
    with pytest.raises(DataError, match=r"x.zip/000.png"):
        load_data(tmp_path / "x.zip", SMOKE)
    assert len(load_data(tmp_path / "x.zip", SMOKE, skip_unreadable=True).train) == 4


def test_what_cannot_be_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    for path, wanted in (("absent", "does not exist"), ("x.txt", "not a folder, zip, .npy or .npz")):
        with pytest.raises(DataError, match=rf"--data takes a folder, a zip.* Received: .*{path}, which .*{wanted}"):
            load_data(tmp_path / path, SMOKE)
    (tmp_path / "zips").mkdir()
    pack(draw_faces(tmp_path / "data", 3), tmp_path / "zips" / "x.zip")
    with pytest.raises(DataError, match=r"none a picture .* pass x\.zip itself"):
        load_data(tmp_path / "zips", SMOKE)


# Splits


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The files of forty pictures."""
    folder = draw_faces(tmp_path_factory.mktemp("many"), 40, (32, 32))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(40)),
    few=st.integers(20, 39),
    share=st.floats(0.1, 0.6),
)
def test_adding_or_renaming_pictures_moves_none(
    order: list[int], few: int, share: float, many: list[bytes], tmp_path: Path
) -> None:
    def held(name: str, chosen: list[int]) -> dict[bytes, bool]:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for place, index in enumerate(chosen):
            (folder / f"{place}.png").write_bytes(many[index])
        splits = load_data(folder, replace(SMOKE, validation=share))
        parts = [(splits.train, False)] + ([(splits.validation, True)] if splits.validation else [])
        return {image.tobytes(): side for part, side in parts for image in part.images}

    small, large = held("small", order[:few]), held("large", sorted(order))
    assert len(small) == few
    assert small.items() <= large.items()


def test_the_share_held_back_is_the_one_asked_for(tmp_path: Path) -> None:
    pictures = images(4000, 16, 16, 3)
    np.save(tmp_path / "x.npy", pictures)
    splits = load_data(tmp_path / "x.npy", replace(SMOKE, validation=0.2))
    assert splits.validation
    assert len(splits.validation) == pytest.approx(800, abs=100)  # four standard deviations
    together = np.concatenate([splits.train.images, splits.validation.images])
    assert {image.tobytes() for image in together} == {image.tobytes() for image in pictures}
    assert len(together) == 4000
    assert isinstance(splits.train.images, np.memmap)


def test_pictures_held_back_join_an_official_validation_split(celeba: Path) -> None:
    (celeba / "list_eval_partition.txt").write_text(OFFICIAL)
    train, validation, test = counts(load_data(celeba, replace(CELEBA, validation=0.5)))
    assert (train + validation, test) == (10, 2)
    assert validation > 4


def test_limit_takes_the_first(pictures: Path) -> None:
    whole, few = load_data(pictures, SMOKE), load_data(pictures, replace(SMOKE, limit=10))
    assert np.array_equal(few.train.images, whole.train.images[:10])


def test_batches_come_in_the_order_asked_for(pictures: Path) -> None:
    images = load_data(pictures, SMOKE).train
    indices = np.array([40, 3, 3, 17])
    assert np.array_equal(images.batch(indices, np.random.default_rng(0)), images.images[indices])
    for part in (images.images[7:], images.images[::3]):  # views of a map are maps
        assert np.array_equal(
            Dataset(part, False, Report()).batch(indices[1:3], np.random.default_rng(0)), part[[3, 3]]
        )
    with pytest.raises(IndexError):
        images.batch(np.array([0, 48]), np.random.default_rng(0))
    flipped = replace(images, flip=True).batch(np.zeros(200, int), np.random.default_rng(0))
    mirrored = (flipped == images.images[0, :, ::-1]).all(axis=(1, 2, 3))
    assert 60 < mirrored.sum() < 140
    assert (flipped[~mirrored] == images.images[0]).all()
