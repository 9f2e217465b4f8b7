"""sample-cli as it is typed: to make pictures, and to verify them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import command

SHARDED = ("npy", "parquet", "webdataset")


def sample(
    bundle: Path, out: object, *words: object, n: int = 100, **settings: Any
) -> subprocess.CompletedProcess[str]:
    return command("sample-cli", "--model", bundle, "--out", out, "--n", n, *words, **settings)


def verify(bundle: Path, place: object, *words: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return command("sample-cli", "--model", bundle, "--verify", place, *words, **settings)
