"""How a process of a tensor-parallel group ends when the group cannot go on: with one line."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import NoReturn

from splitserve.errors import Unavailable

EXIT_FAILED = 1
REPORT_S = 1.0
"""Longest that writing the line may take, such as into a full pipe."""

BLAME_S = 2.0
"""How long a failed exchange waits for the watch to say whose end made it fail."""

_log = logging.getLogger(__name__)


class Ending:
    """Ends this process once, whichever thread notices first.

    A rank that is gone leaves the others in collectives that never return, some of them on a GPU,
    so that nothing but the end of the process frees them. Clients see their connections close,
    and what started the worker starts it again.
    """

    def __init__(
        self,
        report: Callable[[str], None] = _log.critical,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._report = report
        self._exit_process = exit_process
        self._first = threading.Lock()
        self._last_acts: list[Callable[[], object]] = []
        self._expected = threading.Event()

    def before_exit(self, act: Callable[[], object]) -> None:
        """Run `act` before the process ends by `fail`, such as to end its children."""
        self._last_acts.append(act)

    def expect(self) -> None:
        """The group is being stopped: that ranks end is no fault any more."""
        self._expected.set()

    @property
    def is_expected(self) -> bool:
        """Whether the group is being stopped."""
        return self._expected.is_set()

    def fail(self, line: str | None) -> NoReturn:
        """End the process, after writing `line` unless another thread was first.

        None ends it silently, where another process says the line.
        """
        if self._first.acquire(blocking=False):
            for act in self._last_acts:
                with contextlib.suppress(Exception):
                    act()
            if line:
                writing = threading.Thread(target=self._report, args=(line,), daemon=True)
                writing.start()
                writing.join(REPORT_S)
            self._exit_process(EXIT_FAILED)
        threading.Event().wait()
        raise AssertionError("unreachable: the process ends")

    def lost(self, what: str, error: Exception) -> NoReturn:
        """End after `what` failed. The end of a rank is the usual cause, and the watch names it.

        Raises `Unavailable` instead if the group is being stopped.
        """
        if not self._expected.wait(BLAME_S):
            text = " ".join(str(error).split())
            self.fail(f"{what} failed, so this worker ends: {text}")
        raise Unavailable("the group of ranks has been stopped") from error
