"""SIGINT and SIGTERM: a run ends in a state that the same command can resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal asked training to stop, and everything is saved; `signal` is its number.

    It is a BaseException, as KeyboardInterrupt is, so that no code between handles it as an error.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """Notes SIGINT and SIGTERM, for work that looks whether one came; a second signal ends the process at once.

    To raise from the handler itself is not safe: within TensorFlow's and JAX's own callbacks it crashes the process, or
    is lost.

    Attributes:
        signal: The one that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals during a block; raise Stopped at its end, at the latest, if one came."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self.check()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal came. Whatever was not finished is simply done again by the next call."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        os.write(2, b"stopping once what is under way is saved; a second signal ends it at once\n")  # safe in a handler
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
