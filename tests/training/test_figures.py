"""What a training draws and tells TensorBoard, looked at as files."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from training.data.dataset import Splits, load_data
from training.fit.execution import Execution
from training.fit.stop import Stopped, StopRequest
from training.fit.two_stage import train_two_stages
from training.recipe import Recipe
from training.recipes import recipe
from training.record import grids, plots
from training.record.run import Run
from training.record.stage import Observer, Observers, Schedule
from training.record.tensorboard import TensorBoardWriter

SMALL = ("epochs=3", "epochs2=2", "batch=8", "sample_every=2")
ALWAYS = {"figures/history.png", "samples/reconstructions.png", "samples/interpolations.png"}
VARIATIONAL = {f"figures/figure{number}.png" for number in (5, 6, 7)}


class Nothing:
    """A observer that looks away."""

    def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None: ...

    def epoch(self, schedule: Schedule, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


class StopAfter(Nothing):
    """A observer that asks for a stop when an epoch of stage 1 is done."""

    def __init__(self, stop: StopRequest, epoch: int) -> None:
        self.stop, self.last = stop, epoch

    def epoch(self, schedule: Schedule, record: dict[str, Any]) -> None:
        if (schedule.stage, record["epoch"]) == (1, self.last):
            self.stop.signal = 15


def train(
    path: Path, splits: Splits, wanted: Recipe, observer: Observer | None = None, stop: StopRequest | None = None
) -> Run:
    run = Run(path)
    with run.open(wanted, {"count": len(splits.train), "digest": splits.train.digest}):
        train_two_stages(wanted, splits, run, observer or Nothing(), stop or StopRequest(), Execution())
    return run


@pytest.fixture(scope="module")
def splits(pictures: Path) -> Splits:
    """Drawn faces; a quarter of them held back."""
    every = load_data(pictures, recipe("smoke")).train
    one, two = (replace(every, images=part) for part in (every.images[:36], every.images[36:]))
    return Splits(one, two, None)


@pytest.fixture(scope="module")
def watched(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that TensorBoard was told of."""
    path = tmp_path_factory.mktemp("runs") / "watched"
    with TensorBoardWriter(Run(path)) as board:
        return train(path, splits, recipe("smoke").set(SMALL), board)


@pytest.fixture(scope="module")
def deterministic(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "rae"
    settings = ("epochs=12", "batch=8", "sample_every=2", "first_stage=rae-l2", "priors=gaussian")
    return train(path, splits, recipe("smoke").set(settings))


def drawn(run: Run) -> set[str]:
    return {
        str(path.relative_to(run.path)) for folder in ("figures", "samples") for path in (run.path / folder).iterdir()
    }


def assert_shows_something(path: Path) -> None:
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.std() > 1, f"{path.name} is blank"
    if path.parent.name == "figures":
        assert 900 <= picture.shape[1] <= 1700
        assert 280 <= picture.shape[0] <= 700
        for edge in (picture[:, 0], picture[:, -1], picture[0], picture[-1]):
            assert (edge == 255).all(), f"something is cut off at an edge of {path.name}"


def test_a_variational_run_is_drawn(watched: Run) -> None:
    assert drawn(watched) >= ALWAYS | VARIATIONAL
    for name in ALWAYS | VARIATIONAL:
        assert_shows_something(watched.path / name)
    assert not list(watched.path.rglob(".part-*"))


def test_what_train_vae_leaves_behind(smoke_run: Path) -> None:
    for name in ALWAYS | VARIATIONAL:
        assert_shows_something(smoke_run / name)


def test_figure_2_has_the_style_of_the_others(watched: Run, tmp_path: Path) -> None:
    """A bold title in ink and a hint below it, at the left above the axes, and the legend beside them."""
    curves = {"REC": {1: 90.0, 2: 40.0, 3: 30.0}, "GEN-1": {1: 120.0, 2: 80.0, 3: 70.0}}
    plots.distances(tmp_path / "figures" / "figure2.png", "FD (tiny)", curves)
    assert_shows_something(tmp_path / "figures" / "figure2.png")
    ink, soft = (tuple(bytes.fromhex(color[1:])) for color in (plots.INK, plots.SOFT))
    for path in (tmp_path / "figures" / "figure2.png", watched.path / "figures" / "figure7.png"):
        head = np.asarray(Image.open(path).convert("RGB"))[:55, :600]
        colors = {tuple(color) for color in head.reshape(-1, 3).tolist()}
        assert {ink, soft} <= colors, path.name
        legend = np.asarray(Image.open(path).convert("L"))[:55, 700:]
        assert legend.min() < 100, path.name


def test_a_deterministic_run_has_no_posteriors_to_draw(deterministic: Run) -> None:
    assert drawn(deterministic) >= ALWAYS
    assert not drawn(deterministic) & VARIATIONAL
    for name in ALWAYS:
        assert_shows_something(deterministic.path / name)


def test_reconstructions_stand_beside_held_back_pictures(watched: Run, splits: Splits) -> None:
    sheet = np.asarray(Image.open(watched.path / "samples" / "reconstructions.png"))
    held_back, gap = splits.validation.images, 2
    first = sheet[gap : gap + 16, gap : gap + 16]
    assert np.array_equal(first, held_back[0])
    beside = sheet[gap : gap + 16, gap + 16 : gap + 32]
    expected = watched.load_networks(1)(held_back[:1] / np.float32(255), training=False)[0]
    assert np.abs(beside - np.asarray(expected)[0] * 255).max() <= 1


def test_without_held_back_pictures_the_training_ones_are_shown(watched: Run, splits: Splits, tmp_path: Path) -> None:
    copy = Run(tmp_path)
    for name in ("history.jsonl", "trace.jsonl", "diagnostics.json"):
        (tmp_path / name).write_bytes((watched.path / name).read_bytes())
    grids.draw(copy, watched.load_networks(1), Splits(splits.train, None, None))
    sheet = np.asarray(Image.open(tmp_path / "samples" / "reconstructions.png"))
    assert np.array_equal(sheet[2:18, 2:18], splits.train.images[0])


def test_interpolations_go_from_one_reconstruction_to_another(watched: Run, splits: Splits) -> None:
    sheet = np.asarray(Image.open(watched.path / "samples" / "interpolations.png"))
    assert sheet.shape == (grids.ROWS * 16, grids.STEPS * 16, 3)
    shown = splits.train.images[np.linspace(0, len(splits.train) - 1, 2 * grids.ROWS).astype(int)] / np.float32(255)
    ends = np.asarray(watched.load_networks(1)(shown, training=False)[0]) * 255
    assert np.abs(sheet[:16, :16] - ends[0]).max() <= 1
    assert np.abs(sheet[:16, -16:] - ends[grids.ROWS]).max() <= 1


@given(
    latents=st.integers(1, 6).flatmap(
        lambda size: st.tuples(*[st.lists(st.floats(-9, 9, width=32), min_size=size, max_size=size)] * 2)
    ),
    steps=st.integers(2, 9),
)
@settings(max_examples=60, deadline=None)
def test_interpolation_keeps_its_ends_and_its_length(latents: tuple[list[float], list[float]], steps: int) -> None:
    start, end = (np.float32([values]) for values in latents)
    path = grids.spherical(start, end, steps)
    np.testing.assert_allclose(path[:, 0], start, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(path[:, -1], end, rtol=1e-5, atol=1e-5)
    assert np.isfinite(path).all()
    lengths = np.linalg.norm(path[0], axis=-1)
    assert lengths.max() <= max(lengths[0], lengths[-1]) * (1 + 1e-5) + 1e-5


def test_two_grey_pictures_are_enough(tmp_path: Path) -> None:
    from training.model.build import image_autoencoder, plain

    vae = image_autoencoder(recipe("smoke").set(["channels=1"]))
    two = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), np.uint8)
    networks = plain(vae.encoder, vae.decoder)
    grids.interpolations(tmp_path / "one.png", networks, two)
    grids.reconstructions(tmp_path / "two.png", networks, two)
    assert Image.open(tmp_path / "one.png").size == (grids.STEPS * 16, 16)
    assert Image.open(tmp_path / "two.png").mode == "L"


def test_histories_of_any_length_and_kind_are_plotted(watched: Run, deterministic: Run, tmp_path: Path) -> None:
    one_epoch = [record for record in watched.history() if record["epoch"] == 1]
    first_stage, second_stage = deterministic.history(), [each for each in watched.history() if each["stage"] == 2]
    assert "validation_mse" in first_stage[0]
    unpenalised = [{**record, "penalty": 0.0} for record in first_stage]
    later = [{key: value for key, value in first_stage[0].items() if key != "validation_mse"}, *first_stage[1:]]
    kinds = {
        "held back later": later,
        "one": one_epoch,
        "penalised": first_stage,
        "unpenalised": unpenalised,
        "both": first_stage + second_stage,
    }
    for name, records in kinds.items():
        plots.history(tmp_path / f"{name}.png", records)
        assert_shows_something(tmp_path / f"{name}.png")
    wide, narrow = (Image.open(tmp_path / f"{name}.png").width for name in ("penalised", "unpenalised"))
    assert wide > narrow  # what is not measured has no panel


def test_hundreds_of_latents_are_plotted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [{"step": 1, "epoch": epoch, "latent_variance": rng.uniform(0, 1.4, 256).tolist()} for epoch in range(4)]
    plots.along_training(tmp_path / "figures" / "many.png", records)
    plots.along_first_epoch(tmp_path / "figures" / "one.png", records[:1])
    plots.variances(tmp_path / "figures" / "histogram.png", rng.uniform(0, 30, 256))
    for path in (tmp_path / "figures").iterdir():
        assert_shows_something(path)


def events(run: Run) -> Iterator[Event]:
    """Read TensorBoard's events: length, its checksum, an event, its checksum; again and again."""
    for path in sorted((run.path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert len(data) >= length + 16, "the last event is cut off"
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown(run: Run) -> dict[tuple[str, int], Any]:
    """Return what TensorBoard shows, by tag and step; nothing may be there twice."""
    pairs = [((value.tag, event.step), value) for event in events(run) for value in event.summary.value]
    assert max(Counter(key for key, _ in pairs).values()) == 1
    return dict(pairs)


def expected_scalars(run: Run) -> dict[tuple[str, int], float]:
    records = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    ends = {
        1: 0,
        2: max(record["images"] for record in records if record["stage"] == 1),
    }  # stage 2 counts on from there
    return {
        (f"stage{record['stage']}/{name}", ends[record["stage"]] + record["images"]): value
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("stage", "epoch", "images")
    }


def scalars(run: Run) -> dict[tuple[str, int], float]:
    return {key: value.simple_value for key, value in shown(run).items() if value.HasField("simple_value")}


def test_tensorboard_shows_the_history(watched: Run) -> None:
    assert scalars(watched) == pytest.approx(expected_scalars(watched), rel=1e-6)
    assert ("stage1/validation_mse", 96) in scalars(watched)
    values = shown(watched)
    histogram = values["stage1/latent_variance", 32].histo
    assert histogram.num == 8
    assert histogram.sum == pytest.approx(sum(watched.history()[0]["latent_variance"]))
    assert ("stage2/latent_variance", 96 + 64) in values


def test_tensorboards_second_stage_counts_on_from_the_first(watched: Run) -> None:
    steps = {stage: [step for tag, step in scalars(watched) if tag == f"{stage}/mse"] for stage in ("stage1", "stage2")}
    assert steps == {"stage1": [32, 64, 96], "stage2": [96 + 32, 96 + 64]}
    every = [event.step for event in events(watched)]
    assert every == sorted(every)


def test_tensorboard_shows_the_grids(watched: Run) -> None:
    images = {key: value.image for key, value in shown(watched).items() if value.HasField("image")}
    assert sorted(images) == [("stage1/samples", 64), ("stage1/samples", 96)]  # every second epoch, and the last
    assert {(image.height, image.width) for image in images.values()} == {(8 * 16, 8 * 16)}


def test_a_deterministic_stage_has_no_histogram(deterministic: Run) -> None:
    with TensorBoardWriter(deterministic) as board:
        board.epoch(Schedule(1, 36, 1, 8, 1e-3, 2, 0), deterministic.history()[-1])
    tags = {tag for tag, _ in shown(deterministic)}
    assert {"stage1/embedding", "stage1/penalty"} <= tags
    assert "stage1/latent_variance" not in tags


def test_a_resumed_run_shows_every_step_once(splits: Splits, tmp_path: Path) -> None:
    wanted, path = recipe("smoke").set(SMALL), tmp_path / "run"
    stop = StopRequest()
    with pytest.raises(Stopped), TensorBoardWriter(Run(path)) as board:
        train(path, splits, wanted, Observers(board, StopAfter(stop, 2)), stop)
    run = Run(path)
    assert {step for _, step in scalars(run)} == {32, 64}
    # As a kill leaves it: an epoch recorded and shown that no checkpoint knows of, and half an event.
    late = {**run.history()[-1], "epoch": 3, "images": 96, "mse": 123.0}
    run.append(late)
    with TensorBoardWriter(run) as board:
        board.epoch(Schedule(1, 36, 3, 8, 1e-3, 2, 0), late)
    assert scalars(run)["stage1/mse", 96] == 123
    (file,) = (path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])

    stop = StopRequest()
    with pytest.raises(Stopped), TensorBoardWriter(run) as board:
        train(path, splits, wanted, Observers(board, StopAfter(stop, 3)), stop)
    assert scalars(run) == pytest.approx(expected_scalars(run), rel=1e-6)
    assert scalars(run)["stage1/mse", 96] < 1
    assert {step for tag, step in scalars(run) if tag == "stage1/mse"} == {32, 64, 96}


def test_events_are_on_disk_when_an_epoch_ends(watched: Run) -> None:
    board = TensorBoardWriter(watched)
    board.epoch(Schedule(2, 36, 2, 8, 1e-3, 2, 0), watched.history()[-1])
    assert scalars(watched) == pytest.approx(expected_scalars(watched), rel=1e-6)
    board.__exit__(None, None, None)


def test_nothing_is_written_where_nothing_was_trained(tmp_path: Path) -> None:
    with TensorBoardWriter(Run(tmp_path / "run")):
        pass
    assert not (tmp_path / "run").exists()


def test_every_observer_is_told() -> None:
    told = []

    class Note(Nothing):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, schedule: Schedule, epoch: int, images: int, logs: dict[str, Any]) -> None:
            told.append((self.name, epoch, images, logs))

        def epoch(self, schedule: Schedule, record: dict[str, Any]) -> None:
            told.append((self.name, record))

    both, schedule = Observers(Note("a"), Note("b")), Schedule(1, 36, 3, 8, 1e-3, 2, 0)
    both.step(schedule, 1, 8, {"mse": 0.5})
    both.epoch(schedule, {"epoch": 1})
    assert told == [("a", 1, 8, {"mse": 0.5}), ("b", 1, 8, {"mse": 0.5}), ("a", {"epoch": 1}), ("b", {"epoch": 1})]
