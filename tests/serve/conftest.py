"""What the tests of HTTP share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import serving
from tests.serve.site import Site, site


@pytest.fixture(scope="module")
def http_site(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    log = tmp_path_factory.mktemp("http") / "log"
    words = ("--model", smoke_bundle, "--device", "cpu", "--metrics", "127.0.0.1:0")
    with serving(*words, "--http", "127.0.0.1:0", log=log) as (_, process):
        yield site(log, process)
