"""The run directory: everything that a training run keeps. Neither a kill nor a power cut loses what is written.

config.json       the recipe as run, the data's identity, the backend, versions
stage1.keras      encoder and decoder of stage 1 (plain Keras layers: loads without this package)
stage2.keras      the same of stage 2
prior-NAME.keras  an ex-post density: noise -> latents
sharpened.keras   stage 1's decoder as sharpening left it, if it was sharpened
snapshots/        stage 1 after every snapshot_every epochs of the recipe
state/            what going on needs: weights, optimizer, policy, position in the epoch
history.jsonl     one record an epoch; epochs count from 1
trace.jsonl       the latents' variances along the first epoch
diagnostics.json  facts about the latents
metrics.json      measurements, if any were made: a list, each with its protocol
figures/*.png     the run, plotted
samples/*.png     grids of samples
tensorboard/      the same for TensorBoard
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.errors import RunError
from training.files import append_line, make_folder, replacing, write_json, writing
from training.recipe import BEST_FIRST, PRIORS, Recipe
from training.record.documents import Documents
from training.record.models import load_model, reason, save_model
from training.record.stage import Position
from training.settings import text
from training.types import Record

# What may change when a run is gone on with: only upwards; while stage 2 is not begun; while sharpening is not
# finished, which then begins anew; at any time.
_MORE = ("epochs", "epochs2", "epochs3")
_SECOND = (
    "second_dim",
    "second_depth",
    "batch2",
    "epochs2",
    "epoch_steps2",
    "lr2",
    "halve_every2",
    "balance2",
    "gamma2",
)
_THIRD = (
    "epochs3",
    "epoch_steps3",
    "batch3",
    "lr3",
    "halve_every3",
    "critic_dim",
    "feature_matching",
    "pixel_matching",
    "averaging",
)
MEASURING = "measuring"  # the lock that is held while measurements are written
_KEPT = ("priors", "sample_every", "snapshot_every")


class Run(Documents):
    """A run directory. Constructing one touches nothing on disk."""

    @property
    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            RunError: there is no run in this folder.
            RecipeError: another version wrote it.
        """
        return Recipe.from_dict(self.config["recipe"])

    @contextmanager
    def open(self, recipe: Recipe, data: dict[str, Any], start: str = "") -> Iterator[Recipe]:
        """Start the run, or check that it is the same run and go on with it; yield its recipe. It is locked meanwhile.

        Until something was trained, the folder belongs to nobody, and another recipe may have it.

        Args:
            recipe: The recipe wanted. A run that was begun can take more epochs and more priors: what it has is kept.
            data: The pictures' count and digest.
            start: The digest of the weights that training starts from; "" where it starts from noise.

        Raises:
            RunError: the folder holds a run of another recipe, other pictures or another backend, or other files, or
                another process is training in it.
            WriteError: the folder cannot be written to.
        """
        self.check_ours()
        busy = f"another process is training in {self.path}; wait for it, or choose another --out"
        with self.locked("lock", busy):
            if self.begun:
                recipe = self._extended(recipe, data, start)
            else:
                with writing(self.path):
                    self._clear()
                versions = {"keras": keras.__version__, "numpy": np.__version__, "python": platform.python_version()}
                config = {"recipe": recipe.to_dict(), "data": data, "backend": _backend(), "versions": versions}
                write_json(self.path / "config.json", config | ({"from": start} if start else {}))
            yield recipe

    def check_ours(self) -> None:
        """Raise RunError where the folder holds other things than a run."""
        ours = (self.path / "config.json").exists() or (self.path / "state" / "lock").exists()
        if not ours and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"--out takes a new folder or one of train-vae's. Received: {self.path}")
        if not (self.path / "config.json").exists() and (self._state(1).exists() or self.network_path(1).exists()):
            raise RunError(f"{self.path} was trained, and its config.json is gone; choose another --out")

    def _clear(self) -> None:
        """Remove what an attempt left that was given up before anything was saved: it would pass for this run's."""
        for path in [self.path / name for name in ("figures", "samples", "snapshots", "tensorboard")]:
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        files = [self.path / name for name in ("diagnostics.json", "history.jsonl", "metrics.json", "trace.jsonl")]
        later = [path for stage in (2, 3) for path in (self.network_path(stage), self._state(stage))]
        for path in (*files, *later, *(self.prior_path(name) for name in PRIORS)):
            path.unlink(missing_ok=True)

    @property
    def begun(self) -> bool:
        """Whether anything was trained here that would be lost."""
        return (self.path / "config.json").exists() and (self._state(1).exists() or self.network_path(1).exists())

    @contextmanager
    def locked(self, name: str, refusal: str = "") -> Iterator[None]:
        """Hold one of the run's locks during a block. The kernel releases it however the process ends.

        Args:
            name: The name of the lock's file in state/; "lock" is that of training.
            refusal: The error if another process holds the lock. Without one, wait for that process.

        Raises:
            RunError: another process holds the lock, and there is a refusal.
        """
        path = self.path / "state" / name
        with writing(self.path, path.parent, path):
            make_folder(path.parent)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError:
                raise RunError(refusal) from None
            yield

    def _extended(self, wanted: Recipe, data: dict[str, Any], start: str) -> Recipe:
        """Return the recipe to go on with, and undo what more epochs make out of date.

        Raises:
            RunError: what was trained cannot become what is wanted.
        """
        config = self.config
        recipe = self.recipe
        priors = (*recipe.priors, *(name for name in wanted.priors if name not in recipe.priors))
        wanted = replace(wanted, name=recipe.name, priors=priors)
        if self.network_path(1).exists() and wanted.epochs == recipe.epochs:
            wanted = replace(wanted, warm_up=recipe.warm_up)  # it is over
        before, now = recipe.to_dict(), wanted.to_dict()
        for key in now:
            if before[key] != now[key] and not self._may_change(key, before[key], now[key]):
                fewer = " to fewer" if key in _MORE else ""
                anew = ", or delete sharpened.keras and state/stage3.npz there to sharpen anew" if key in _THIRD else ""
                if key in _SECOND:
                    anew = ", or delete stage2.keras and state/stage2.npz there to train stage 2 anew"
                raise RunError(
                    f"{self.path} holds another run: {key} is {text(before[key])} there and {text(now[key])} here, "
                    f"and cannot change{fewer}; choose another --out or the same settings{anew}"
                )
        if config["data"] != data:
            raise RunError(f"{self.path} was trained on other pictures than --data holds; choose another --out")
        # Another backend draws other noise and rounds differently: the run would not be the same.
        if (backend := config.get("backend", _backend())) != _backend():
            raise RunError(
                f"{self.path} is trained with KERAS_BACKEND={backend}; set that to go on with it, or choose another "
                f"--out. Received: {_backend()}"
            )
        if start and start != config.get("from"):
            raise RunError(
                f"{self.path} did not start from the weights of --from; choose another --out, or leave it out"
            )
        if wanted.epochs > recipe.epochs:
            self._reopen(1)
        if wanted.epochs2 > recipe.epochs2:
            self._reopen(2)
        if wanted.epochs3 > recipe.epochs3:
            self._reopen(3)
        changed = {key for key in _THIRD if before[key] != now[key]}
        more = changed == {"epochs3"} and wanted.epochs3 > recipe.epochs3
        # Or it was sharpened on samples of another prior than those it is to decode.
        if (changed and not more) or _best(wanted.priors) != _best(recipe.priors):
            self._discard(3)
        if "second-stage" in recipe.priors and not (self.network_path(2).exists() or self._state(2).exists()):
            self._discard(2)  # whoever deleted it trains it anew
            self._discard(3)
        if not self.sharpened:
            self._forget_metrics(3)
        if wanted != recipe:
            write_json(self.path / "config.json", {**config, "recipe": now})
        return wanted

    def _may_change(self, key: str, before: Any, now: Any) -> bool:
        """Tell whether a setting may change in a run that was begun, without undoing what was finished."""
        if key in _SECOND and not (self._state(2).exists() or self.network_path(2).exists()):
            return True
        if key in _THIRD and not self.sharpened:
            return True
        if key in _MORE:
            return bool(now > before)
        return key in _KEPT or (key == "gmm_components" and not self.prior_path("gmm").exists())

    def _reopen(self, stage: int) -> None:
        """Make a finished stage one that can be gone on with. What was made of it goes first: a kill loses only that.

        Raises:
            RunError: the state of training is gone.
        """
        if not self.network_path(stage).exists():
            return
        if not self._state(stage).exists():
            raise RunError(
                f"{self._state(stage)} is gone, which more epochs take; train into another --out with --from"
            )
        if stage < 3:
            self._discard(3)
        if stage == 1:
            for path in (self.network_path(2), self._state(2), *(self.prior_path(name) for name in PRIORS)):
                path.unlink(missing_ok=True)
        self._forget_metrics(stage, self.network_path(stage))

    def _discard(self, stage: int) -> None:
        """Remove what a stage trained, and what was noted and measured of it."""
        self._state(stage).unlink(missing_ok=True)
        self.forget(stage, 0, 0)
        self._forget_metrics(stage, self.network_path(stage))

    def _forget_metrics(self, stage: int, *networks: Path) -> None:
        """Drop the measurements that depend on a stage, and what they are of: they would pass for those to come."""
        with self.locked(MEASURING):
            kept = [each for each in self.metrics if stage > 1 and "decoder" not in each]
            if stage == 2:
                kept = [each for each in kept if each.get("prior") != "second-stage"]
            if kept != self.metrics:
                write_json(self.path / "metrics.json", kept)
            for path in networks:
                path.unlink(missing_ok=True)

    @property
    def versions(self) -> dict[str, int]:
        """When each stage's networks were written, by the names of their files: another time, other networks."""
        paths = [path for path in map(self.network_path, (1, 2, 3)) if path.exists()]
        return {path.name: path.stat().st_mtime_ns for path in paths}

    def append(self, record: Record, name: str = "history") -> None:
        """Add an epoch's record to history.jsonl, or one to trace.jsonl. Do so before saving a state beyond it."""
        append_line(self.path / f"{name}.jsonl", json.dumps(record))

    def history(self, name: str = "history") -> list[Record]:
        """Return the records of history.jsonl, or of trace.jsonl."""
        try:
            lines = (self.path / f"{name}.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def forget(self, stage: int, epoch: int, step: int) -> None:
        """Drop the records after a position of a stage, as a resumed run writes them again."""
        now = (stage, epoch)
        self._keep("history", [each for each in self.history() if (each["stage"], each["epoch"]) <= now])
        if now <= (1, 0):
            self._keep("trace", [each for each in self.history("trace") if each["step"] <= step])

    def _keep(self, name: str, records: list[Record]) -> None:
        with replacing(self.path / f"{name}.jsonl") as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in records))

    def save_state(self, stage: int, variables: list[Any], position: Position) -> None:
        """Save what resuming a stage needs: Keras variables, in order, and the position."""
        arrays: dict[str, Any] = {f"{index:05d}": np.asarray(variable) for index, variable in enumerate(variables)}
        arrays["position"] = np.frombuffer(position.to_json(), np.uint8)
        with replacing(self._state(stage)) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def load_state(self, stage: int, variables: list[Any]) -> Position | None:
        """Restore what `save_state` saved, and return its position; None if there is nothing to resume.

        Raises:
            RunError: the state is damaged or belongs to other networks.
        """
        if not self._state(stage).exists():
            return None
        with self._readable(stage), np.load(self._state(stage), allow_pickle=False) as arrays:
            if len(arrays.files) != len(variables) + 1:
                raise ValueError(f"{len(arrays.files) - 1} arrays instead of {len(variables)}")
            for index, variable in enumerate(variables):
                variable.assign(arrays[f"{index:05d}"])
            return Position.from_json(arrays["position"].tobytes())

    def saved_position(self, stage: int) -> Position | None:
        """Return the position of a stage's saved state; None if there is none.

        Raises:
            RunError: the state is damaged.
        """
        if not self._state(stage).exists():
            return None
        with self._readable(stage), np.load(self._state(stage), allow_pickle=False) as arrays:
            return Position.from_json(arrays["position"].tobytes())

    @contextmanager
    def _readable(self, stage: int) -> Iterator[None]:
        """Raise RunError where a block cannot read a stage's state."""
        try:
            yield
        except Exception as error:  # zipfile, zlib, numpy and Keras each have their own for broken bytes
            raise RunError(
                f"cannot resume from {self._state(stage)}: {reason(error)}; delete it to train stage {stage} anew"
            ) from None

    def _state(self, stage: int) -> Path:
        return self.path / "state" / f"stage{stage}.npz"

    def network_path(self, stage: int) -> Path:
        """The file of a finished stage's networks; of stage 3, the decoder that it sharpened."""
        return self.path / ("sharpened.keras" if stage == 3 else f"stage{stage}.keras")

    def prior_path(self, name: str) -> Path:
        """The file of an ex-post density."""
        return self.path / f"prior-{name}.keras"

    def snapshot_path(self, epoch: int) -> Path:
        """The file of the snapshot of stage 1 after so many epochs."""
        return self.path / "snapshots" / f"stage1-{epoch:04d}.keras"

    def finish(self, stage: int, networks: keras.Model) -> None:
        """Write a finished stage's encoder and decoder. The saved state stays, so that more epochs can follow."""
        save_model(self.network_path(stage), networks)

    def load_networks(self, stage: int) -> keras.Model:
        """Return a finished stage's encoder and decoder as one model.

        Raises:
            RunError: the file is missing or damaged.
        """
        return load_model(self.network_path(stage))

    @property
    def sharpened(self) -> bool:
        """Whether stage 1's decoder was sharpened."""
        return self.network_path(3).exists()

    def decoder(self, plain: bool = False) -> keras.Model:
        """Return the decoder that makes the run's pictures, latents -> images in [0, 1]: sharpened, if it is to be.

        Args:
            plain: Whether to take stage 1's own in any case.

        Raises:
            RunError: the file is missing or damaged; stage 1's decoder does not take the place of a sharpened one.
        """
        if self.recipe.epochs3 and not plain:
            if self.network_path(1).exists() and not self.sharpened:
                raise RunError(
                    f"{self.path} is not sharpened yet; run train-vae to its end, or take stage 1's own decoder by "
                    "--plain"
                )
            return load_model(self.network_path(3))
        return self.load_networks(1).get_layer("decoder")

    @property
    def priors(self) -> tuple[str, ...]:
        """The names of the run's priors; the standard normal, which every run has, is the first."""
        here = {name: self.network_path(2) if name == "second-stage" else self.prior_path(name) for name in PRIORS}
        return ("normal", *(name for name, path in here.items() if path.exists()))

    @property
    def default_prior(self) -> str:
        """The prior that samples are drawn from unless another is named: the first that the run has of BEST_FIRST."""
        return _best(self.priors)

    def prior(self, name: str) -> keras.Model:
        """Return a prior: noise float32 [n, noise_size] -> latents float32 [n, latent_dim].

        noise_size is latent_dim, and one more for "gmm", whose last column chooses the component.

        Raises:
            RunError: the run has no such prior.
        """
        if name == "second-stage":
            return self.load_networks(2).get_layer("decoder")
        if name == "normal":
            noise = keras.Input((self.recipe.latent_dim,), name="noise")
            return keras.Model(noise, noise, name="normal")
        return load_model(self.prior_path(name))


def _best(priors: Collection[str]) -> str:
    return next(name for name in BEST_FIRST if name in (*priors, "normal"))  # which every run has


def _backend() -> str:
    return str(keras.backend.backend())
