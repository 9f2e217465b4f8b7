"""From files to served models: validate fully, warm up, then swap; what cannot be served changes nothing.

A file is served under its own name: `faces.onnx` as the model faces, version 1, `faces@3.onnx` as its version 3.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from serve.bundle import Bundle, load
from serve.card import NAME, NAME_RULE, Card
from serve.engine import Engine
from serve.errors import BundleError, EngineError, ServeError, SettingsError
from serve.noise import draw
from serve.server.models import MESSAGE_BYTES, Model, Registry
from serve.server.settings import Settings
from serve.server.telemetry import Telemetry
from serve.server.work import Backend, Budget
from serve.text import one_line, quoted

SERVED_AS = re.compile(rf"({NAME.pattern})(?:@([1-9][0-9]{{0,8}}))?")
PROBE = 4  # samples that devices have to agree on
BESIDE_CARD = 512  # bytes that ListModels says of a model beside its card, at most

Stamp = tuple[int, int, int]
Result = TypeVar("Result")

log = logging.getLogger("serve-vae")


def engines(settings: Settings) -> Callable[[Bundle], Sequence[Backend]]:
    """Return what opens a bundle on every device of the settings."""

    def opened(bundle: Bundle) -> Sequence[Backend]:
        made = [
            Engine(
                bundle,
                device,
                settings.threads,
                settings.max_batch,
                arithmetic=settings.arithmetic,
                cuda_graphs=settings.cuda_graphs,
                cache=settings.cache,
            )
            for device in settings.device
        ]
        for engine in made:
            log.debug("%s on %s: batches of %s", engine.name, engine.device, engine.buckets)  # which runs all of them
        probes = [engine.compute(draw(0, 0, min(PROBE, engine.batch), bundle.card.noise_size)) for engine in made]
        for engine, probe in zip(made[1:], probes[1:], strict=True):
            if engine.arithmetic != made[0].arithmetic or not np.array_equal(probe, probes[0]):
                raise EngineError(
                    f"{engine.device} and {made[0].device} give other pictures, which breaks the noise contract "
                    "within one server; serve them from two"
                )
        return made

    return opened


def served_as(path: Path) -> tuple[str, int]:
    """Return the name and the version that a file is served under; its card may say another name.

    Raises:
        BundleError: a file cannot be served under such a name.
    """
    match = SERVED_AS.fullmatch(path.name.removesuffix(".onnx"))
    if not match:
        raise BundleError(
            f"a model's file is called NAME.onnx or NAME@VERSION.onnx, the name {NAME_RULE}, the version a whole "
            f"number from 1; rename it. Received: {quoted(path.name)}"
        )
    return match[1], int(match[2] or 1)


class Loader:
    """Loads files into a registry, and keeps it like a folder.

    Args:
        settings: Devices, batches, the folder.
        registry: Where models go.
        budget: Shared by all models.
        telemetry: Counts loads and batches.
        opened: Opens a bundle on the devices.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        budget: Budget,
        telemetry: Telemetry,
        opened: Callable[[Bundle], Sequence[Backend]],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._budget = budget
        self._telemetry = telemetry
        self._opened = opened
        self._one = asyncio.Lock()  # at a time: warming up takes all cores
        self._thread = ThreadPoolExecutor(1, "load")
        self._last: Future[Any] | None = None
        self._served: dict[Path, Model] = {}
        self._tried: dict[Path, Stamp] = {}
        self._seen: dict[Path, Stamp] = {}
        # What was refused because another file's model had its name and version: that file, as it was then.
        self._second: dict[Path, tuple[Path, Stamp | None]] = {}
        self._blind = False  # whether the folder could not be looked at

    async def load(self, path: Path) -> Model:
        """Serve a file, in the place of what it or its version was before.

        Raises:
            ServeError: why it cannot be served. Nothing has changed then.
        """
        async with self._one:
            if path.parent == self._settings.models:
                with suppress(OSError):  # which reading it will say
                    self._tried[path] = _stamp(path)
            try:
                model = await self._load(path)
            except Exception as error:  # whatever one file does, it is this file's refusal
                self._telemetry.loads.labels("refused").inc()
                if isinstance(error, ServeError):
                    raise
                raise BundleError(f"{path.name} cannot be served: {type(error).__name__}: {error}") from error
            except asyncio.CancelledError:  # whoever asked for it waits no longer; that says nothing of the file
                self._tried.pop(path, None)
                raise
        self._telemetry.loads.labels("loaded").inc()
        what = f"{model.card.precision}, {model.arithmetic}, {', '.join(model.devices)}, sha256 {model.digest[:12]}"
        log.info("serving %s version %d (%s%s)", model.name, model.version, what, model.on_card)
        return model

    async def _load(self, path: Path) -> Model:
        name, version = served_as(path)
        bundle = await self._in_thread(load, path)
        self._check_fits(path, bundle.card, name, version)
        made = await self._in_thread(self._opened, bundle)
        observer = self._telemetry.batches(name)
        delay = self._settings.max_delay
        file = bundle.data if self._settings.share_models else None
        model = Model(made, name, version, file, self._budget, delay, observer, self._registry.changed)
        before = self._served.get(path)
        self._registry.put(model)
        if before:
            self._registry.drop(before)  # unless `put` has replaced it already
        self._served[path] = model
        return model

    @property
    def busy(self) -> bool:
        """Whether a file is being read, or a model warmed up: nothing can interrupt that, nor has anybody to wait."""
        return self._last is not None and not self._last.done()

    async def _in_thread(self, what: Callable[..., Result], *arguments: Any) -> Result:
        # Not asyncio's own threads, which are waited for at the end.
        self._last = future = self._thread.submit(what, *arguments)
        return await asyncio.wrap_future(future)

    def _check_fits(self, path: Path, card: Card, name: str, version: int) -> None:
        """Raise BundleError where a file's model does not go with those of other files."""
        size = len(card.to_json())
        for other, model in self._served.items():
            if other == path:
                continue
            if (model.name, model.version) == (name, version):
                self._second[path] = other, self._tried.get(other)
                files = "two files" if other.name == path.name else f"{other.name} and {path.name}"
                raise BundleError(
                    f"{files} are both the model {name}, version {version}; rename one: {name}@{version + 1}.onnx is "
                    "another version of it, and another NAME.onnx another model"
                )
            size += len(model.card.to_json()) + BESIDE_CARD
        if size > MESSAGE_BYTES:
            raise BundleError("the cards of all models would be over the 4 MiB that ListModels can say; serve fewer")

    def unload(self, model: Model) -> None:
        """Serve a model no longer; its file is not looked at again until it changes."""
        self._served = {path: each for path, each in self._served.items() if each is not model}
        self._registry.drop(model)
        log.info("no longer serving %s version %d", model.name, model.version)

    async def listing(self) -> dict[str, Path]:
        """Return the folder's model files by name: the only way from a name on the wire to a file.

        Raises:
            SettingsError: the folder cannot be looked at.
        """
        try:
            paths = await asyncio.to_thread(self._paths)
        except OSError as error:
            raise SettingsError(f"cannot look at the model folder: {error.strerror}") from None
        return {path.name: path for path in paths if path.name.isprintable()}

    async def scan(self, settle: bool = True) -> None:
        """Make the registry like the folder; what cannot be loaded is logged and left until it changes.

        Args:
            settle: Whether a file has to look the same twice before it is read: it may still be being written.
        """
        try:
            files = await self._in_thread(self._stamps)
        except OSError as error:
            if not self._blind:
                log.error("cannot look at the model folder, which stays as it was: %s", error.strerror)
            self._blind = True
            return
        self._blind = False
        for path in [each for each in self._served if each.parent == self._settings.models and each not in files]:
            self.unload(self._served[path])
        for path, (first, stamp) in list(self._second.items()):
            if path not in files or files.get(first) != stamp:  # the name may be free now
                del self._second[path]
                self._tried.pop(path, None)
        self._tried = {path: stamp for path, stamp in self._tried.items() if path in files}
        for path, stamp in files.items():
            if self._tried.get(path) == stamp or (settle and self._seen.get(path) != stamp):
                continue
            self._tried[path] = stamp
            self._second.pop(path, None)
            try:
                await self.load(path)
            except ServeError as error:
                log.error("refused %s, and the models already served are not affected: %s", one_line(path.name), error)
        self._seen = files

    async def watch(self, seconds: float) -> None:
        """Look at the folder every so many seconds, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.scan()
            except Exception:  # a bug must not end the watching
                log.exception("cannot keep up with the model folder; looking again in %g s", seconds)

    def _paths(self) -> list[Path]:
        assert self._settings.models is not None
        return sorted((path for path in self._settings.models.iterdir() if path.suffix == ".onnx"), key=_turn)

    def _stamps(self) -> dict[Path, Stamp]:
        stamps = {}
        for path in self._paths():
            try:
                stamps[path] = _stamp(path)
            except FileNotFoundError:
                continue  # taken away between the listing and now
            except OSError as error:  # links in a circle, say: loading it says so, once
                stamps[path] = (0, 0, error.errno or 0)
        return stamps


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _turn(path: Path) -> tuple[str, int, str]:
    """Return what sorts files: a model's highest version, which requests have that name none, is loaded first."""
    match = SERVED_AS.fullmatch(path.stem)
    return (match[1], -int(match[2] or 1), path.name) if match else (path.stem, 0, path.name)
