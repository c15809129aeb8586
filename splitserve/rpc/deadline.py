"""Deadlines do not travel from hop to hop by themselves: each hop computes the next one's."""

from __future__ import annotations

from typing import Protocol

from splitserve.errors import DeadlineExceeded

DEFAULT_MARGIN_S = 0.05


class HasDeadline(Protocol):
    """What is used of `grpc.aio.ServicerContext`."""

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""


def remaining_s(context: HasDeadline) -> float | None:
    """Seconds until the call's deadline, 0 once it has passed; None without a deadline."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, remaining)


def next_hop_timeout(context: HasDeadline, margin_s: float = DEFAULT_MARGIN_S) -> float | None:
    """What to pass as `timeout=` to a call made on behalf of this one; None without a deadline.

    The margin leaves time to turn the next hop's answer into this one's. Raises DeadlineExceeded
    if nothing is left.
    """
    remaining = remaining_s(context)
    if remaining is None:
        return None
    if remaining <= margin_s:
        raise DeadlineExceeded("the deadline passed before the next service could be called")
    return remaining - margin_s
