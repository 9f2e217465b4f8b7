"""Keeping a long-lived server's memory flat where the C library is glibc; elsewhere these do nothing.

Pictures are made by one thread and freed by another, between the weights of models that come and go. glibc gives each
thread a heap of its own, up to eight for each core, and every one of them keeps its holes: under a mix of streams,
bursts, killed readers and swaps a server grew by 80 MB in four minutes, and with two heaps by 40 MB.
"""

from __future__ import annotations

import ctypes
from typing import Any

M_ARENA_MAX = -8  # as <malloc.h> numbers it
HEAPS = 2


def share_heaps() -> None:
    """Let all threads share a few heaps. Call it before there are threads."""
    _glibc("mallopt", M_ARENA_MAX, HEAPS)


def give_back() -> None:
    """Return what is freed to the system."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *values: int) -> Any:
    function = getattr(ctypes.CDLL(None), name, None)
    return function(*values) if function else None
