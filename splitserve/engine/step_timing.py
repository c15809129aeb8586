"""How long steps and their launches take, and so when the next one is to be launched.

Times are of the monotonic clock, in seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from splitserve.engine.flights import Flight
from splitserve.engine.prefill_rate import PrefillRate

_NEW = 0.125
_NEW_DEVIATION = 0.25
_DEVIATIONS = 2.0
_SURE_FROM = 8
_SEQUENCES_ALIKE = 8
_TOKENS_ALIKE = 32
_SHARE_FOR_SURE = 0.9
"""Steps full of prompts take at least this part of what the rate of others like them says."""


class Estimate:
    """A time that varies, foreseen as TCP foresees an answer's (Jacobson 1988, RFC 6298): by a mean
    and a multiple of the mean deviation.
    """

    def __init__(self, seconds: float) -> None:
        """Of what was measured once, so that `low` is 0."""
        self._count = 1
        self._mean_s = seconds
        self._deviation_s = seconds / _DEVIATIONS

    def add(self, seconds: float) -> None:
        """Measured again."""
        self._count += 1
        error_s = seconds - self._mean_s
        self._mean_s += _NEW * error_s
        self._deviation_s += _NEW_DEVIATION * (abs(error_s) - self._deviation_s)

    @property
    def is_sure(self) -> bool:
        """Whether it was measured often enough for the first guess to be forgotten."""
        return self._count >= _SURE_FROM

    @property
    def low(self) -> float:
        """It hardly takes less."""
        return max(0.0, self._mean_s - _DEVIATIONS * self._deviation_s)

    @property
    def high(self) -> float:
        """It hardly takes more."""
        return self._mean_s + _DEVIATIONS * self._deviation_s


class StepTiming:
    """Of the steps of one loop."""

    def __init__(self, max_step_tokens: int, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._prefill_rate = PrefillRate(max_step_tokens)
        self._steps: dict[tuple[int, int], Estimate] = {}
        self._launch = Estimate(0.0)
        self._landed_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """See `PrefillRate`."""
        return self._prefill_rate.per_s

    def landed(self, flight: Flight) -> None:
        """It has just been read."""
        now = self._now()
        took_s = now - max(flight.began_s, self._landed_s)
        all_tokens = sum(chunk.size for chunk in flight.chunks)
        self._prefill_rate.add(_prompt_tokens(flight), all_tokens, took_s)
        self.took(_prompt_tokens(flight), len(flight.chunks), took_s)
        self._landed_s = now

    def failed(self) -> None:
        """A step has ended that tells nothing."""
        self._landed_s = self._now()

    def took(self, prompt_tokens: int, sequences: int, seconds: float) -> None:
        """Learn how long the device takes for a step of this size."""
        size = _size(prompt_tokens, sequences)
        if size in self._steps:
            self._steps[size].add(seconds)
        else:
            self._steps[size] = Estimate(seconds)

    def launched(self, decided_s: float) -> None:
        """A step was launched just now that was to be launched from `decided_s` on."""
        self._launch.add(self._now() - decided_s)

    def launch_at(self, flight: Flight) -> float:
        """When to begin with the step behind this one, so that the device hardly ever waits for it:
        who is there by then shares it. Of a size that is not known well yet, prompts alone are
        taken to last as long as their rate says, others no time at all.
        """
        tokens = _prompt_tokens(flight)
        step = self._steps.get(_size(tokens, len(flight.chunks)))
        lasts_s = 0.0
        if step is not None and step.is_sure:
            lasts_s = step.low
        elif self.prefill_tokens_per_s and all(chunk.size > 1 for chunk in flight.chunks):
            lasts_s = _SHARE_FOR_SURE * tokens / self.prefill_tokens_per_s
        return max(flight.began_s, self._landed_s) + lasts_s - self._launch.high


def _size(prompt_tokens: int, sequences: int) -> tuple[int, int]:
    return prompt_tokens // _TOKENS_ALIKE, sequences // _SEQUENCES_ALIKE


def _prompt_tokens(flight: Flight) -> int:
    return sum(chunk.size for chunk in flight.chunks if chunk.size > 1)
