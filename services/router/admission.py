"""How much the router takes on at once, and when to come back if it is too much."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from splitserve.errors import Overloaded

RATE_WINDOW_S = 10.0
FIRST_RETRY_S = 1.0
MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0


class ServiceRate:
    """Units a second, averaged with a weight that decays over `RATE_WINDOW_S`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._weight = 0.0
        self._started_s: float | None = None
        self._last_s = 0.0

    def add(self, units: float) -> None:
        """Counts units that were served now."""
        now = self._clock()
        if self._started_s is None:
            self._started_s = self._last_s = now
        self._weight = self._weight * math.exp((self._last_s - now) / RATE_WINDOW_S) + units
        self._last_s = now

    def seconds_for(self, units: float) -> float:
        """How long `units` will take at the measured rate, within the limits for a retry."""
        if self._started_s is None or self._weight <= 0:
            return FIRST_RETRY_S
        now = self._clock()
        weight = self._weight * math.exp((self._last_s - now) / RATE_WINDOW_S)
        # The sum over a window that has run for `age` only, without the bias of its empty rest.
        age = max(now - self._started_s, MIN_RETRY_S)
        window = RATE_WINDOW_S * (1.0 - math.exp(-age / RATE_WINDOW_S))
        seconds = units * window / max(weight, 1e-9)
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)


class Ticket:
    """One request's place. Its tokens count as queued until its first token is out.

    Both methods may be called twice; `release` is to be called whatever happens.
    """

    def __init__(self, admission: Admission, prompt_tokens: int) -> None:
        self._admission = admission
        self._prompt_tokens = prompt_tokens
        self._queued = True
        self._running = False

    def first_token(self) -> None:
        """The prompt has been computed."""
        if self._queued:
            self._queued = False
            self._admission._unqueue(self._prompt_tokens, served=True)

    def release(self) -> None:
        """The request has ended."""
        if self._queued:
            self._queued = False
            self._admission._unqueue(self._prompt_tokens, served=False)
        if self._running:
            self._running = False
            self._admission._leave()


class Admission:
    """Bounds requests that run, requests that wait, and prompt tokens not yet computed.

    A request waits its turn while `max_running` others run, and is refused if it cannot even
    wait. A prompt over `max_queued_tokens` on its own is let in when nothing else is queued, so
    that every prompt that fits the model can be served.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        max_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_queued_tokens = max_queued_tokens
        self._running = 0
        self._queued_tokens = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._requests_rate = ServiceRate(clock)
        self._tokens_rate = ServiceRate(clock)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiters)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of all requests here that have no first token yet."""
        return self._queued_tokens

    async def admit(self, prompt_tokens: int) -> Ticket:
        """Wait for a place. Raises Overloaded, with when to retry, if there is no room to wait."""
        self.refuse_if_full(prompt_tokens)
        ticket = Ticket(self, prompt_tokens)
        self._queued_tokens += prompt_tokens
        if self._running < self._max_running and not self._waiters:
            self._running += 1
            ticket._running = True
            return ticket
        turn = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()
            else:
                self._waiters.remove(turn)
            ticket.release()
            raise
        ticket._running = True
        return ticket

    @property
    def capacity(self) -> int:
        """Requests that may run and wait."""
        return self._max_running + self._max_waiting

    def refuse_if_full(self, prompt_tokens: int = 0) -> None:
        """Raise Overloaded if a request with that many prompt tokens could not even wait."""
        over = self._queued_tokens + prompt_tokens - self._max_queued_tokens
        if self._queued_tokens and over > 0:
            raise Overloaded(
                f"{self._queued_tokens} prompt tokens are queued and {prompt_tokens} more would "
                f"exceed {self._max_queued_tokens}; retry later",
                retry_after_s=self._tokens_rate.seconds_for(over),
            )
        if self._running >= self._max_running and len(self._waiters) >= self._max_waiting:
            raise Overloaded(
                f"{self._running} requests run and {len(self._waiters)} wait; retry later",
                retry_after_s=self._requests_rate.seconds_for(len(self._waiters) + 1),
            )

    def _unqueue(self, prompt_tokens: int, *, served: bool) -> None:
        self._queued_tokens -= prompt_tokens
        if served:
            self._tokens_rate.add(prompt_tokens)

    def _leave(self) -> None:
        """Give a place up: to the one who has waited longest, if any. `running` counts the heir."""
        self._requests_rate.add(1)
        while self._waiters:
            turn = self._waiters.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._running -= 1
