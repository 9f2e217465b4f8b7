"""What pictures are like, before it is decided how to train on them: how many, how large, grey or not, mirrorable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from training.data.cache import Cache, default_folder
from training.data.images import in_parallel
from training.data.sources import PictureSource, opened
from training.data.splits import Advance
from training.errors import DataError
from training.recipe import Recipe
from training.types import Float64Array, UInt8Array

FEWEST = 16  # pictures: a model of fewer can only repeat them
LOOKED_AT = 1000  # pictures, spread over all of them
PROBE = Recipe(side=32)  # how they are looked at
GREY_WITHIN = 4  # levels between the channels of a grey picture; JPEG is not exact
FOLDS = 5
RIDGE = 10.0  # in units of the features' mean variance
KNOWN = 0.6  # share of pictures that a classifier has to know from their mirror images
TRIFLE = 0.01  # of the pictures' variance


@dataclass(frozen=True)
class Survey:
    """Facts about a source of pictures.

    Attributes:
        count: Train pictures.
        side: The median of the pictures' shorter sides, in pixels.
        grey: Whether all that were looked at are grey.
        mirrors: Whether mirror images look like further pictures, as those of faces and landscapes do, and those of
            digits and text do not.
    """

    count: int
    side: int
    grey: bool
    mirrors: bool


def survey(path: Path, *, cache: Path | None = None, advance: Advance | None = None) -> Survey:
    """Look at the pictures that a path holds, as `load_data` takes it.

    Raises:
        DataError: there are too few, or none of those looked at can be read.
    """
    with opened(path, PROBE, Cache(cache or default_folder()), advance) as source:
        train = np.flatnonzero(source.splits == 0)
        if len(train) < FEWEST:
            raise DataError(
                f"{FEWEST} pictures or more make a model, and a few hundred a useful one; of fewer it could only "
                f"repeat them. Received: {len(train)}"
            )
        chosen = train[np.linspace(0, len(train) - 1, min(len(train), LOOKED_AT)).astype(np.intp)].tolist()
        seen = [each for each in in_parallel(lambda index: _look(source, index), chosen) if each is not None]
    if not seen:
        raise DataError(f"none of the {len(chosen)} pictures looked at in {path} can be read")
    pictures = np.stack([picture for _, picture in seen])
    spread = pictures.max(axis=-1).astype(int) - pictures.min(axis=-1)
    grey = bool(spread.max() <= GREY_WITHIN)
    return Survey(len(train), round(median(side for side, _ in seen)), grey, not mirrored_differ(pictures))


def _look(source: PictureSource, index: int) -> tuple[int, UInt8Array] | None:
    try:
        return min(source.size(index)), source.picture(index)
    except Exception:  # decoders raise almost anything; `load_data` names what cannot be read, and why
        return None


def mirrored_differ(pictures: UInt8Array) -> bool:
    """Tell whether pictures [n, side, side, channels] differ from their mirror images evidently, and as a whole.

    A picture minus its mirror image changes its sign when the picture is mirrored. Evidently: a linear classifier of
    such differences knows pictures that it was not fitted to. As a whole: the mean difference is no trifle, such as
    an outline that is a pixel off, beside what pictures differ by among themselves.
    """
    half = pictures.mean(axis=-1).reshape(len(pictures), 16, 2, 16, 2).mean(axis=(2, 4))
    odd = (half - half[:, :, ::-1]) / 2
    whole = np.mean(odd.mean(axis=0) ** 2) / max(np.mean(half.var(axis=0)), 1e-9)
    rows = odd[:, :, :8].reshape(len(pictures), -1)
    fold = np.arange(len(rows)) % FOLDS
    known = np.concatenate([_known(rows[fold != each], rows[fold == each]) for each in range(FOLDS)])
    chance = 1.5 / len(rows) ** 0.5  # three deviations of a share that is 1/2
    return bool(whole > TRIFLE and known.mean() > max(KNOWN, 0.5 + chance))


def _known(fitted: Float64Array, rest: Float64Array) -> Float64Array:
    """Return 1 for each row of `rest` on the side of the plane where those of `fitted` are; else 0, or 1/2."""
    gram = fitted.T @ fitted
    weights = np.linalg.solve(gram + (RIDGE * gram.trace() / len(gram) + 1e-9) * np.eye(len(gram)), fitted.sum(axis=0))
    return np.asarray((np.sign(rest @ weights) + 1) / 2, np.float64)
