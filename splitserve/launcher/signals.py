"""Ctrl-C and SIGTERM as one exception that never comes at a bad moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, a stop signal raises KeyboardInterrupt in the main thread, once.

    Inside `held` it waits until the block has ended: a process that was just started must be
    noted before anything else happens, and stopping must not be stopped. Use in the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._holds = 0
        self._due = False
        self.count = 0
        """How many signals have come."""

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals that come inside raise at its end."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._raise_if_due()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        # Only the first raises: those after it must not cut short what it has set off.
        self._due = self._due or self.count == 1
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._due and not self._holds:
            self._due = False
            raise KeyboardInterrupt
