"""How kernels are timed on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS = 12
WARM_S = 0.015


def graph_us(calls: Sequence[Callable[[], object]], *, replays: int = REPLAYS) -> float:
    """Microseconds a call: the median replay of a graph of all `calls`, so that launches cost
    nothing. They should go over more memory than the L2 cache holds.
    """
    # Products keep counters for each stream, which must be there before a graph is captured.
    stream = torch.cuda.Stream()
    # Inputs may still be written on the current stream.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    # Clocks rise under load.
    until = time.monotonic() + WARM_S
    while time.monotonic() < until:
        graph.replay()
        torch.cuda.synchronize()
    return statistics.median(event_us(graph.replay) for _ in range(replays)) / len(calls)


def event_us(call: Callable[[], object]) -> float:
    """Microseconds of the device between events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def copy_bytes_per_s() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = [event_us(lambda: target.copy_(source)) for _ in range(8)]
    return 2e6 * source.nbytes / statistics.median(times[2:])
