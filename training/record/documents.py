"""The JSON files of a run directory, read without Keras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.errors import RunError
from training.types import Record


class Documents:
    """What a run directory says of itself. Constructing one touches nothing on disk.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            RunError: there is no run in this folder, or the file cannot be read.
        """
        return self._read("config.json")

    @property
    def diagnostics(self) -> dict[str, Any]:
        """The content of diagnostics.json.

        Raises:
            RunError: the run is not finished, or the file cannot be read.
        """
        return self._read("diagnostics.json")

    @property
    def metrics(self) -> list[Record]:
        """The content of metrics.json; an empty list if nothing was measured.

        Raises:
            RunError: the file cannot be read.
        """
        if not (self.path / "metrics.json").exists():
            return []
        value = self._json("metrics.json")
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise RunError(f"{self.path / 'metrics.json'} should hold a list of JSON objects; mend it, or move it away")
        return value

    def _read(self, name: str) -> dict[str, Any]:
        value = self._json(name)
        if not isinstance(value, dict):
            raise RunError(f"{self.path / name} should hold a JSON object")
        return value

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a finished run: it has no {name}; train-vae makes one") from None
        except RecursionError:
            raise RunError(f"cannot read {self.path / name}: it is nested too deeply") from None
        except (ValueError, OSError) as error:
            raise RunError(f"cannot read {self.path / name}: {error}") from None
