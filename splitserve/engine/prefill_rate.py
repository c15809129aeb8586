"""How fast a worker computes prompts, as far as its last steps tell."""

from __future__ import annotations

import time
from collections.abc import Callable

_MEMORY = 0.9
_LEAST_TOKENS = 128
"""A step takes as long without fewer than these: they say nothing of how many could have been
computed.
"""
_VALID_S = 30.0
"""After that it is not known any more: what made a worker slow may be long over, and nobody who
knows it for slow would ever try it again.
"""


class PrefillRate:
    """Prompt tokens a second over the last ten or so steps, each weighing as much as it took."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0
        self._measured_s = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Count a step that computed so many tokens of prompts, whatever else it did."""
        if num_tokens >= _LEAST_TOKENS and seconds > 0:
            self._tokens = _MEMORY * self._tokens + num_tokens
            self._seconds = _MEMORY * self._seconds + seconds
            self._measured_s = self._clock()

    @property
    def per_s(self) -> float:
        """Tokens a second; 0 where no step has told of late."""
        if not self._seconds or self._clock() - self._measured_s > _VALID_S:
            return 0.0
        return self._tokens / self._seconds
