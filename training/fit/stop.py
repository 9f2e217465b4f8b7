"""What a signal does to a training run: it ends as one that the same command goes on with."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Training was asked to stop and has saved; `signal` says by what.

    As KeyboardInterrupt, it may come from anywhere, and is no error that code on its way may handle.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """What SIGINT and SIGTERM do: raise Stopped, at once or where work can be saved.

    At once, unless a block says that it looks at `signal` itself: what is done in one go is done anew by the next
    call, and files are whole or not there. A second signal ends the process.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the length of a block, which does not end well once one has come."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self._check()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Let signals wait for the length of a block that looks at `signal` where it can save."""
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
