"""Train autoencoders whose reconstruction/KL balance is computed, and their competitors: images -> a run directory.

The subpackages, each of which imports only those below it:

cli, evaluation   the commands train-vae and evaluate-vae
fit               training of both stages, resumable, on one device or several
record            the run directory, progress, figures, TensorBoard
model, data       the paper, in Keras; pictures -> minibatches. Neither imports the other.
recipes, recipe   the named recipes, and what a recipe is
files, errors     files that survive a power cut; what can go wrong

>>> from pathlib import Path
>>> from training import RECIPES, train
>>> run = train(RECIPES["faces"](), Path("photos"), Path("runs/mine"))
>>> run.history()[-1]["mse"]

Networks and training use `keras` and `keras.ops` only, so KERAS_BACKEND=jax or torch trains as well. Importing
`training` itself sets no environment variable and loads no Keras: that happens when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.errors import DataError, Diverged, RecipeError, RunError, TrainingError, WriteError

if TYPE_CHECKING:
    from training.data.dataset import load_data
    from training.fit.two_stage import train
    from training.recipe import Recipe
    from training.recipes import RECIPES
    from training.record.run import Run

__all__ = [
    "RECIPES",
    "DataError",
    "Diverged",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "TrainingError",
    "WriteError",
    "load_data",
    "train",
]

_HOMES = {
    "RECIPES": "recipes",
    "Recipe": "recipe",
    "Run": "record.run",
    "load_data": "data.dataset",
    "train": "fit.two_stage",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `--help` of the commands must not wait for Keras."""
    if name not in _HOMES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"training.{_HOMES[name]}"), name)
