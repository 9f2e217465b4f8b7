"""Several models and versions, changed while the server runs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import onnx
import pytest

from serve import Client, Engine, load
from serve.bundle import CARD_KEY
from serve.errors import Changed, Rejected
from serve.server.folder import Loader, engines
from serve.server.models import Model, Registry
from serve.server.refusal import Code, Refusal
from serve.server.settings import Settings
from serve.server.telemetry import Telemetry
from serve.server.work import Budget
from serve.stubs.admin.v1 import admin_pb2 as admin
from serve.stubs.admin.v1 import admin_pb2_grpc as admin_rpc
from serve.stubs.sampling.v1 import sampling_pb2 as wire
from serve.stubs.sampling.v1 import sampling_pb2_grpc as rpc
from tests.conftest import assert_clear_error, command, metrics, serving


@pytest.fixture(scope="module")
def variant(smoke_bundle: Path) -> Callable[..., bytes]:
    """Make the smoke model under another name, or darker."""

    def make(name: str = "smoke", brightness: float = 1.0) -> bytes:
        model = onnx.load(smoke_bundle)
        entry = next(each for each in model.metadata_props if each.key == CARD_KEY)
        entry.value = json.dumps({**json.loads(entry.value), "name": name})
        if brightness != 1:
            weights = model.graph.initializer[0]
            values = onnx.numpy_helper.to_array(weights) * np.float32(brightness)
            weights.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weights.name))
        return model.SerializeToString()

    return make


def put(data: bytes, path: Path) -> None:
    """Write a file as tools that are not careful do, in two pieces."""
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        file.write(data[len(data) // 2 :])


def digests(client: Client) -> dict[tuple[str, str], str]:
    return {(model.name, model.version): model.digest for model in client.models()}


def until(true: Callable[[], bool]) -> None:
    """Ask until something is so; the test's own time limit is a minute."""
    given_up = threading.Event()
    timer = threading.Timer(60, given_up.set)
    timer.start()
    while not true():
        assert not given_up.wait(0.05), "a minute has passed"
    timer.cancel()


def with_card(data: bytes, text: str) -> bytes:
    """The model with another card."""
    model = onnx.load_model_from_string(data)
    next(each for each in model.metadata_props if each.key == CARD_KEY).value = text
    return bytes(model.SerializeToString())


@pytest.fixture
def folder(tmp_path: Path, variant: Callable[..., bytes]) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    put(variant(), folder / "smoke.onnx")
    put(variant("smoke-int8", 0.5), folder / "smoke@2.onnx")  # the file's name counts, not the card's
    put(variant("cats"), folder / "cats.onnx")
    return folder


@pytest.fixture
def watched(folder: Path) -> Iterator[str]:
    with serving("--models", folder, "--watch", 0.05, "--admin") as (address, _):
        yield address


def test_models_and_versions_are_told_apart(watched: str, folder: Path) -> None:
    old, new = (Engine(load(folder / name)) for name in ("smoke.onnx", "smoke@2.onnx"))
    assert not np.array_equal(old.sample(1, 0, 3), new.sample(1, 0, 3))
    with Client(watched) as client:
        assert sorted(digests(client)) == [("cats", "1"), ("smoke", "1"), ("smoke", "2")]
        for version, engine in (("", new), ("2", new), ("1", old), (old.digest, old)):
            model = client.model("smoke", version)
            assert model.digest == engine.digest
            assert np.array_equal(model.sample(1, 0, 3), engine.sample(1, 0, 3))
        with pytest.raises(Rejected, match="several models"):
            client.model()
        with pytest.raises(Rejected, match=r"no model 'smoke@3'.*cats@1, smoke@2, smoke@1"):
            client.model("smoke", "3")
    for name, engine in (("smoke", new), ("smoke@1", old)):
        words = ("--server", watched, "--model", name, "--n", 3, "--seed", 1, "--format", "npy")
        assert command("sample-cli", *words, "--out", folder.parent / name).returncode == 0
        assert np.array_equal(np.load(folder.parent / name / "000000000.npy"), engine.sample(1, 0, 3))
    with grpc.insecure_channel(watched) as channel:
        stub = rpc.SamplingServiceStub(channel)
        assert stub.GetModel(wire.GetModelRequest(model="smoke", version="1")).model.digest == old.digest
        with pytest.raises(grpc.RpcError) as error:
            stub.Sample(wire.SampleRequest(range=wire.Range(model="smoke", version="7", count=1)))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert "version must be one of 1, 2" in error.value.details()


def test_files_come_change_and_go(watched: str, folder: Path, variant: Callable[..., bytes]) -> None:
    with Client(watched) as client:
        before = digests(client)
        put(variant("dogs"), folder / "dogs.onnx")
        until(lambda: ("dogs", "1") in digests(client))
        (folder / "cats.onnx").unlink()
        until(lambda: ("cats", "1") not in digests(client))
        put(variant(brightness=0.25), folder / "smoke@2.onnx")
        until(lambda: digests(client)["smoke", "2"] != before["smoke", "2"])
        assert digests(client)["smoke", "1"] == before["smoke", "1"]


def test_a_bad_file_is_refused_and_the_old_one_keeps_serving(
    folder: Path, variant: Callable[..., bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving("--models", folder, "--watch", 0.05, log=log) as (address, _), Client(address) as client:
        before = digests(client)
        (folder / "smoke@2.onnx").write_bytes(variant()[:-3000])
        (folder / "text.onnx").write_text("this is no model")
        put(variant("cats", 0.5), folder / "cats@1.onnx")
        said = ("refused smoke@2.onnx", "refused text.onnx", "cats.onnx and cats@1.onnx are both the model cats")
        assert "serving smoke version 2" in log.read_text()
        assert ", called smoke-int8 on its card)" in log.read_text()
        until(lambda: all(words in log.read_text() for words in said))
        assert digests(client) == before
        assert len(client.model("smoke").sample(0, 0, 3)) == 3
        assert "Traceback" not in log.read_text()
        # Mended, it is taken.
        put(variant(brightness=0.75), folder / "smoke@2.onnx")
        until(lambda: digests(client)["smoke", "2"] != before["smoke", "2"])


def test_whatever_one_file_does_the_others_come_and_go(
    folder: Path, variant: Callable[..., bytes], tmp_path: Path
) -> None:
    """Files that are no bundles, in every way; each is refused once, in one line, and the folder is kept up with."""
    log, good = tmp_path / "log", json.loads(load(folder / "cats.onnx").card.to_json())
    with serving("--models", folder, "--watch", 0.05, "--admin", "--metrics", "127.0.0.1:0", log=log) as (address, _):
        bad = {
            "infinite.onnx": with_card(variant(), json.dumps({**good, "image_shape": [math.inf, 16, 3]})),
            "nested.onnx": with_card(variant(), "[" * 200_000),
            "nameless.onnx": with_card(variant(), json.dumps({**good, "name": 5})),
            "escape.onnx": with_card(variant(), json.dumps({**good, "name": "\x1b[2J\ncats"})),
            "long.onnx": with_card(variant(), json.dumps({**good, "notes": "x" * 6_000_000})),
            "surrogate.onnx": with_card(variant(), json.dumps({**good, "licence": "\ud800"})),
            "precise.onnx": with_card(variant(), json.dumps({**good, "precision": {"a": 1}})),
            "half.onnx": with_card(variant(), json.dumps({**good, "name": "half", "noise_size": 8.0})),
            "smoke@v3.onnx": variant(),
            "smoke@0.onnx": variant(),
            "smoke (copy).onnx": variant(),
        }
        for name, data in bad.items():
            put(data, folder / name)
        os.mkfifo(folder / "pipe.onnx")
        (folder / "loop.onnx").symlink_to("loop.onnx")
        (folder / "folder.onnx").mkdir()
        undecodable = os.fsencode(folder) + b"/\xff\xfe.onnx"
        with open(undecodable, "wb") as file:
            file.write(variant("undecodable"))
        put(variant("split"), folder / "two\nlines.onnx")
        refused = [*bad, "pipe.onnx", "loop.onnx", "folder.onnx", r"\udcff\udcfe.onnx", r"two\nlines.onnx"]
        with Client(address) as client, grpc.insecure_channel(address) as channel:
            until(lambda: log.read_text().count("refused") >= len(refused))
            # Two looks later, everything has been said once, and the folder is still kept up with.
            put(variant("dogs"), folder / "dogs.onnx")
            until(lambda: ("dogs", "1") in digests(client))
            (folder / "cats.onnx").unlink()
            until(lambda: ("cats", "1") not in digests(client))
            assert sorted(digests(client)) == [("dogs", "1"), ("smoke", "1"), ("smoke", "2")]
            lines = log.read_text().splitlines()
            for name in refused:
                assert len([line for line in lines if f"refused {name}, " in line]) == 1, name
            assert all(line.isprintable() and len(line) < 500 for line in lines)
            assert len([line for line in lines if "rename it. Received: 'smoke" in line]) == 3
            assert "Traceback" not in log.read_text()
            shown = metrics(log)
            assert f'balancedvae_model_loads_total{{result="refused"}} {len(refused)}.0' in shown
            assert len(shown) < 100_000
            # Callers that load by name are told of the others, and not kept waiting by any.
            stub = admin_rpc.AdminServiceStub(channel)
            assert stub.LoadModel(admin.LoadModelRequest(file="dogs.onnx"), timeout=60).model == "dogs"
            for file, code, words in (
                ("pipe.onnx", grpc.StatusCode.FAILED_PRECONDITION, "not a regular file"),
                ("loop.onnx", grpc.StatusCode.FAILED_PRECONDITION, "symbolic links"),
                ("absent.onnx", grpc.StatusCode.NOT_FOUND, "dogs.onnx, escape.onnx"),
                ("two\nlines.onnx", grpc.StatusCode.NOT_FOUND, r"Received: 'two\nlines.onnx'"),
            ):
                with pytest.raises(grpc.RpcError) as error:
                    stub.LoadModel(admin.LoadModelRequest(file=file), timeout=60)
                assert error.value.code() is code
                assert words in error.value.details()
                assert error.value.details().isprintable()


def test_a_second_file_of_a_model_is_served_once_the_first_is_gone(
    folder: Path, variant: Callable[..., bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with serving("--models", folder, "--watch", 0.05, log=log) as (address, _), Client(address) as client:
        first = digests(client)["cats", "1"]
        put(variant("cats", 0.5), folder / "cats@1.onnx")
        until(lambda: "both the model cats, version 1; rename one: cats@2.onnx" in log.read_text())
        assert digests(client)["cats", "1"] == first
        (folder / "cats.onnx").unlink()
        until(lambda: digests(client).get(("cats", "1")) == load(folder / "cats@1.onnx").digest)
        assert log.read_text().count("refused") == 1


def test_all_cards_together_fit_a_message(folder: Path, variant: Callable[..., bytes], tmp_path: Path) -> None:
    log = tmp_path / "log"
    values = json.loads(load(folder / "cats.onnx").card.to_json())
    for number in range(70):
        values |= {"name": f"cats-{number}", "notes": "é" * 9_500}  # 57 kB of JSON
        (folder / f"cats-{number}.onnx").write_bytes(with_card(variant(), json.dumps(values)))
    words = ("--models", folder, "--max-batch", 1, "--threads", 1, "--device", "cpu")
    with serving(*words, log=log) as (address, _), Client(address) as client:
        assert len(client.models()) > 60
        refused = [line for line in log.read_text().splitlines() if "refused" in line]
        assert len(refused) + len(client.models()) == 73
        assert all("cards of all models" in line for line in refused)
        assert ("smoke", "2") in digests(client)


def test_no_request_fails_while_a_model_is_swapped_under_load(
    watched: str, folder: Path, variant: Callable[..., bytes]
) -> None:
    looks = [variant("smoke-int8", each) for each in (1.0, 0.5, 0.25)]
    engines = {}
    for number, data in enumerate(looks):
        path = folder.parent / f"{number}.onnx"
        path.write_bytes(data)
        engine = Engine(load(path))
        engines[engine.digest] = engine.sample(3, 0, 500)
    stop, problems, seen = threading.Event(), [], set()

    def load_it() -> None:
        with grpc.insecure_channel(watched, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = rpc.SamplingServiceStub(channel)
            while not stop.is_set():
                try:
                    one = stub.Sample(wire.SampleRequest(range=wire.Range(model="smoke", seed=3, count=40)), timeout=60)
                    many = stub.SampleStream(
                        wire.SampleStreamRequest(range=wire.Range(model="smoke", seed=3, count=500)), timeout=60
                    )
                    for chunk in [one.chunk, *(each.chunk for each in many)]:
                        pixels = np.frombuffer(chunk.pixels, np.uint8).reshape(-1, 16, 16, 3)
                        wanted = engines[chunk.digest][chunk.start : chunk.start + chunk.count]
                        if not np.array_equal(pixels, wanted):
                            problems.append(f"wrong samples of {chunk.digest}")
                        seen.add(chunk.digest)
                except grpc.RpcError as error:
                    problems.append(str(error.code()))
                except KeyError as error:
                    problems.append(f"an unknown model {error}")

    threads = [threading.Thread(target=load_it) for _ in range(4)]
    with Client(watched) as client:
        for thread in threads:
            thread.start()
        pinned = client.model("smoke")
        for number in (0, 1, 2):
            part = folder / "part"
            part.write_bytes(looks[number])
            os.replace(part, folder / "smoke@2.onnx")
            until(lambda number=number: problems or list(engines)[number] in seen)
        stop.set()
        for thread in threads:
            thread.join()
        assert not problems
        # Who began with a model is told that it is another one, and never given its samples.
        with pytest.raises(Changed, match="changed the model smoke"):
            pinned.sample(3, 0, 1)


def test_admin_calls_load_and_unload(folder: Path, variant: Callable[..., bytes]) -> None:
    with (
        serving("--models", folder, "--admin") as (address, _),
        grpc.insecure_channel(address) as channel,
        Client(address) as client,
    ):
        stub = admin_rpc.AdminServiceStub(channel)
        put(variant("dogs"), folder / "dogs.onnx")
        loaded = stub.LoadModel(admin.LoadModelRequest(file="dogs.onnx"), timeout=60)
        assert (loaded.model, loaded.version) == ("dogs", "1")
        assert digests(client)["dogs", "1"] == loaded.digest
        stub.UnloadModel(admin.UnloadModelRequest(model="smoke"), timeout=60)
        assert sorted(digests(client)) == [("cats", "1"), ("dogs", "1")]
        stub.LoadModel(admin.LoadModelRequest(file="smoke.onnx"), timeout=60)
        assert ("smoke", "1") in digests(client)
        (folder / "bad.onnx").write_text("this is no model")
        for file, code in (
            ("bad.onnx", grpc.StatusCode.FAILED_PRECONDITION),
            ("absent.onnx", grpc.StatusCode.NOT_FOUND),
            ("../models/dogs.onnx", grpc.StatusCode.NOT_FOUND),
            (str(folder / "dogs.onnx"), grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as error:
                stub.LoadModel(admin.LoadModelRequest(file=file), timeout=60)
            assert error.value.code() is code
            said = error.value.details().partition("Received: ")[0]  # behind it stands what the caller sent
            assert str(folder) not in said


def test_while_a_server_starts_what_it_lacks_may_come() -> None:
    registry = Registry()
    model: Any = SimpleNamespace(name="cats", version=2, digest="d", arithmetic="exact")
    registry.loading = True
    registry.put(model)
    assert registry.get("cats") is registry.get("cats", "2") is registry.of_digest("d") is model
    lacking: list[Callable[[], Model]] = [
        lambda: registry.get("dogs"),
        lambda: registry.get("cats", "1"),
        lambda: registry.of_digest("e"),
    ]
    for ask in (*lacking, lambda: registry.get("")):
        with pytest.raises(Refusal) as error:
            ask()
        assert error.value.code is Code.UNAVAILABLE
    registry.loading = False
    for ask in lacking:
        with pytest.raises(Refusal) as error:
            ask()
        assert error.value.code is Code.NOT_FOUND
    assert registry.get("") is model


def test_the_highest_version_comes_first_and_what_was_unloaded_stays_away(smoke_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("cats", "smoke", "smoke@10", "smoke@2"):
        shutil.copy(smoke_bundle, folder / f"{name}.onnx")
    settings, registry, told = Settings(models=folder), Registry(), Telemetry()
    came: list[tuple[str, int]] = []

    async def scenario() -> None:
        loader = Loader(settings, registry, Budget(10**6, 10**10), told, engines(settings))
        registry.changed = lambda: came.extend((each.name, each.version) for each in registry.models())
        model = await loader.load(folder / "smoke.onnx")
        loader.unload(model)
        came.clear()
        await loader.scan(settle=False)
        assert list(dict.fromkeys(came)) == [("cats", 1), ("smoke", 10), ("smoke", 2)]
        (folder / "smoke.onnx").touch()
        await loader.scan(settle=False)
        assert came[-1] == ("smoke", 1)
        await registry.close()

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_admin_calls_are_off_by_default(server: str) -> None:
    with grpc.insecure_channel(server) as channel, pytest.raises(grpc.RpcError) as error:
        admin_rpc.AdminServiceStub(channel).LoadModel(admin.LoadModelRequest(file="x.onnx"), timeout=20)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_several_engines_share_a_queue(smoke_bundle: Path) -> None:
    words = ("--model", smoke_bundle, "--device", "cpu", "--device", "cpu", "--threads", 1, "--max-batch", 8)
    with serving(*words) as (address, _), Client(address) as client:
        got = np.concatenate([images for _, images in client.model().stream(5, 0, 3000)])
        assert np.array_equal(got, Engine(load(smoke_bundle), device="cpu").sample(5, 0, 3000))


def test_folders_that_cannot_be_served(tmp_path: Path) -> None:
    assert_clear_error(command("serve-vae", "--models", tmp_path / "absent"), "is no folder")
    (tmp_path / "text.onnx").write_text("this is no model")
    result = command("serve-vae", "--models", tmp_path)
    assert_clear_error(result, "no model that can be served")
    assert "refused text.onnx" in result.stderr
    assert_clear_error(command("serve-vae", "--watch", 1), "--models FOLDER", code=2)
    assert_clear_error(command("serve-vae", "--admin"), "--models FOLDER", code=2)
