"""The networks that a run keeps as files, and why one cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras

from training.errors import RunError
from training.files import replacing


def save_model(path: Path, model: keras.Model) -> None:
    """Write a model of stock Keras layers, in the place of the old file."""
    with replacing(path) as part:
        model.save(part)


def load_model(path: Path) -> keras.Model:
    """Return the model that `save_model` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    if not path.exists():
        raise RunError(f"{path.parent} is not a finished run: it has no {path.name}; run train-vae to its end")
    load: Callable[..., keras.Model] = keras.models.load_model
    try:
        return load(path, compile=False)
    except Exception as error:  # h5py, zipfile and Keras each have their own for broken bytes
        raise RunError(f"cannot read {path}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return the first line of what a library says of broken bytes, or the kind of its error."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
