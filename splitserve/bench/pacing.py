"""When each request is sent: by a rate, by a number in flight, or as it was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitserve.bench.workload import WorkItem
from splitserve.errors import ConfigError

DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True)
class Pacing:
    """Request i is sent `offsets_s[i]` after the start, and at most `concurrency` are in flight."""

    offsets_s: tuple[float, ...]
    concurrency: int | None
    description: str


def closed_loop(count: int, concurrency: int) -> Pacing:
    """Always `concurrency` in flight: the next is sent when one ends."""
    return Pacing((0.0,) * count, concurrency, f"{concurrency} in flight")


def open_loop(count: int, rate: float, seed: int) -> Pacing:
    """A Poisson process of `rate` requests a second, whatever the server manages."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=count)
    offsets = np.cumsum(gaps) - gaps[0]
    return Pacing(tuple(offsets.tolist()), None, f"Poisson, {rate:g} requests/s")


def recorded(items: Sequence[WorkItem], time_scale: float) -> Pacing:
    """The workload's own arrivals; a `time_scale` of 0.5 sends them twice as fast.

    Raises ConfigError if the workload has none.
    """
    arrivals = [item.arrival_s for item in items if item.arrival_s is not None]
    if len(arrivals) != len(items):
        raise ConfigError("--time-scale needs a workload with arrival_s on every line")
    first = min(arrivals)
    offsets = tuple((arrival - first) * time_scale for arrival in arrivals)
    return Pacing(offsets, None, f"recorded arrivals x {time_scale:g}")


def choose(
    items: Sequence[WorkItem],
    *,
    rate: float | None,
    concurrency: int | None,
    time_scale: float | None,
    seed: int,
    default_concurrency: int = DEFAULT_CONCURRENCY,
) -> Pacing:
    """What was asked for; else recorded arrivals where there are; else a closed loop."""
    if rate is not None:
        return open_loop(len(items), rate, seed)
    if concurrency is not None:
        return closed_loop(len(items), concurrency)
    if time_scale is not None or items[0].arrival_s is not None:
        return recorded(items, 1.0 if time_scale is None else time_scale)
    return closed_loop(len(items), default_concurrency)
