"""The run directory: everything a training run leaves behind, written so that a kill loses nothing.

config.json       the recipe as run, the data's identity, versions
stage1.keras      encoder and decoder of stage 1 (plain Keras layers: loads without this package)
stage2.keras      the same of stage 2
state/            what resuming needs: weights, optimizer, policy, position in the epoch
history.jsonl     one record an epoch
diagnostics.json  what is known of the latents
metrics.json      measurements, where some were made: a list, each with its protocol
figures/*.png     the history, plotted
samples/*.png     grids of samples
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.errors import RunError
from training.recipes import Recipe

Record = dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes `path`'s place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


class Run:
    """A run directory. Constructing one touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe(self) -> Recipe:
        """The recipe the run was started with.

        Raises:
            RunError: there is no run here, or another version wrote it.
        """
        return Recipe.from_dict(self.config["recipe"])

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return self._read("config.json")

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What diagnostics.json holds."""
        return self._read("diagnostics.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.json holds; nothing where nothing was measured."""
        path = self.path / "metrics.json"
        return list(json.loads(path.read_text())) if path.exists() else []

    def _read(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a finished run: it has no {name}; train-vae makes one") from None
        except (ValueError, OSError) as error:
            raise RunError(f"cannot read {self.path / name}: {error}") from None
        if not isinstance(value, dict):
            raise RunError(f"{self.path / name} should hold a JSON object")
        return value

    def open(self, recipe: Recipe, data: dict[str, Any]) -> None:
        """Start the run, or check that it is the same one and go on with it.

        Args:
            recipe: The recipe wanted.
            data: Identity of the pictures (their count and digest).

        Raises:
            RunError: the folder holds a run of another recipe or other pictures, or something else.
        """
        if not (self.path / "config.json").exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise RunError(f"--out takes a new folder or one of train-vae's. Received: {self.path}")
            versions = {"keras": keras.__version__, "numpy": np.__version__, "python": platform.python_version()}
            config = {"recipe": recipe.to_dict(), "data": data, "versions": versions}
            write_json(self.path / "config.json", config)
            return
        before, now = self.config["recipe"], recipe.to_dict()
        for key in sorted(set(before) | set(now)):
            if before.get(key) != now.get(key):
                raise RunError(
                    f"{self.path} holds another run: {key} is {before.get(key)} there and {now.get(key)} here; "
                    "choose another --out or the same settings"
                )
        if self.config["data"] != data:
            raise RunError(f"{self.path} was trained on other pictures than --data holds; choose another --out")

    def append(self, record: Record) -> None:
        """Add an epoch's record to history.jsonl."""
        with (self.path / "history.jsonl").open("a") as history:
            history.write(json.dumps(record) + "\n")

    def history(self) -> list[Record]:
        """Return the records of all epochs."""
        try:
            lines = (self.path / "history.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def forget(self, stage: int, epoch: int) -> None:
        """Drop the records from an epoch of a stage on: a resumed run writes them again."""
        kept = [record for record in self.history() if (record["stage"], record["epoch"]) < (stage, epoch)]
        with replacing(self.path / "history.jsonl") as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save_state(self, stage: int, variables: list[Any], position: Record) -> None:
        """Save what resuming a stage needs: Keras variables, in order, and where training stands."""
        arrays: dict[str, Any] = {f"{index:05d}": np.asarray(variable) for index, variable in enumerate(variables)}
        arrays["position"] = np.frombuffer(json.dumps(position).encode(), np.uint8)
        with replacing(self._state(stage)) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def load_state(self, stage: int, variables: list[Any]) -> Record | None:
        """Restore what `save_state` saved; None where there is nothing to resume.

        Raises:
            RunError: the file is damaged or belongs to other networks.
        """
        path = self._state(stage)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if len(arrays.files) != len(variables) + 1:
                    raise ValueError(f"{len(arrays.files) - 1} arrays instead of {len(variables)}")
                for index, variable in enumerate(variables):
                    variable.assign(arrays[f"{index:05d}"])
                position: Record = json.loads(arrays["position"].tobytes())
                return position
        except Exception as error:  # zipfile, zlib, numpy and Keras each have their own for broken bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"cannot resume from {path}: {reason}; delete it to train stage {stage} anew") from None

    def _state(self, stage: int) -> Path:
        return self.path / "state" / f"stage{stage}.npz"

    def has_networks(self, stage: int) -> bool:
        """Tell whether a stage is finished."""
        return (self.path / f"stage{stage}.keras").exists()

    def save_networks(self, stage: int, networks: keras.Model) -> None:
        """Write a finished stage's encoder and decoder, and drop the state it no longer needs."""
        with replacing(self.path / f"stage{stage}.keras") as part:
            networks.save(part)
        self._state(stage).unlink(missing_ok=True)

    def load_networks(self, stage: int) -> keras.Model:
        """Return a stage's encoder and decoder as `save_networks` got them.

        Raises:
            RunError: they are missing or damaged.
        """
        path = self.path / f"stage{stage}.keras"
        if not path.exists():
            raise RunError(f"{self.path} is not a finished run: it has no {path.name}; run train-vae to its end")
        load: Callable[..., keras.Model] = keras.models.load_model
        try:
            return load(path, compile=False)
        except Exception as error:  # h5py, zipfile and Keras each have their own for broken bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"cannot read {path}: {reason}") from None
