"""SIGINT and SIGTERM: a run ends in a state that the same command can resume."""

from __future__ import annotations

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
    """Turns SIGINT and SIGTERM into Stopped.

    Stopped is raised at once, as most work is simply done again by the next call, and no file is ever half written.
    Within `deferring` a signal is only noted in `signal`, for code that saves first. A second signal ends the process.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals during a block; raise Stopped at its end, at the latest, if one came."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self._check()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Only note signals during a block, which has to look at `signal` wherever it can save."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        self._check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if not self.deferred:
            raise Stopped(number)

    def _check(self) -> None:
        if self.signal is not None:
            raise Stopped(self.signal)
