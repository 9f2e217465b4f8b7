"""SIGINT and SIGTERM for a command that runs until its work is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """A signal asked for the end."""


class StopRequest:
    """Notes SIGINT and SIGTERM, for work that looks whether one came; a second signal ends the process at once.

    To raise from the handler itself is not safe: it may run while the main thread takes a lock, which then stays taken,
    and the threads that write would wait for it for ever.

    Attributes:
        signal: The one that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._wake: Callable[[], None] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Have this called in a thread of its own when a signal comes, or has come: it ends what is waited for."""
        self._wake = wake
        if self.signal is not None:
            self._call()

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.signal is not None:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        self._call()

    def _call(self) -> None:
        if self._wake:
            threading.Thread(target=self._wake, daemon=True).start()
