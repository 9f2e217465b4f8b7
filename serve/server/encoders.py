"""Threads that turn pictures into files, beside the event loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve.encoding import encode
from serve.model import Images
from serve.server.telemetry import Telemetry


class Encoders:
    """As many as cores."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._size = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="encode")

    async def encode(self, images: Sequence[Images], kind: str) -> list[bytes]:
        """Return a file a picture, in order."""
        began, loop = time.monotonic(), asyncio.get_running_loop()
        parts = [part for each in images for part in np.array_split(each, min(self._size, len(each)))]
        files = await asyncio.gather(*(loop.run_in_executor(self._pool, _encode, part, kind) for part in parts))
        self._telemetry.encode.labels(kind).observe(time.monotonic() - began)
        return [file for part in files for file in part]

    async def whole(self, make: Callable[[], bytes], kind: str) -> bytes:
        """Return one file of many pictures, which `make` makes in a thread."""
        began = time.monotonic()
        file = await asyncio.get_running_loop().run_in_executor(self._pool, make)
        self._telemetry.encode.labels(kind).observe(time.monotonic() - began)
        return file


def _encode(images: Images, kind: str) -> list[bytes]:
    return [encode(image, kind) for image in images]
