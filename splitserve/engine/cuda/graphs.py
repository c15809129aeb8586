"""CUDA graphs of steps: a few launches, instead of some hundreds, for shapes that come often.

A step that may have to tell of its layers is recorded in parts, each up to the layer that ends a
group, so that what waits for the group can be put between two launches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.layout import StepPlan, StepShape

LayerDone = Callable[[int], None]

NEWS_ROOM = 1024
"""Numbers that have a place behind those of a recorded step, see `StepGraphs.numbers`."""

_REPLAYS = 4


@dataclass(frozen=True)
class _Recorded:
    parts: list[torch.cuda.CUDAGraph]
    last_layers: list[int]
    """Of each part but the last, the layer whose keys and values it stores last."""
    numbers: Tensor
    logits: Tensor

    def replay(self, layer_done: LayerDone | None = None) -> None:
        """Launch it; `layer_done` is told of each layer that ends a part."""
        for part, layer in zip(self.parts, self.last_layers, strict=False):
            part.replay()
            if layer_done:
                layer_done(layer)
        self.parts[-1].replay()


@dataclass
class _Recording:
    """A recording under way on the current stream."""

    pool: Any
    ends_part: Callable[[int], bool]
    parts: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    last_layers: list[int] = field(default_factory=list)
    is_open: bool = False

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool)
        self.parts.append(graph)
        self.is_open = True

    def end(self) -> None:
        if self.is_open:
            self.is_open = False
            self.parts[-1].capture_end()

    def layer_done(self, layer: int) -> None:
        """End a part where it should; what comes after all layers is the last part's."""
        if self.ends_part(layer):
            self.last_layers.append(layer)
            self.end()
            self.begin()


class StepGraphs:
    """Graphs by shape. All share one pool of memory, which is safe as they run one after the other
    and what outlives a replay is copied out of it.
    """

    def __init__(
        self,
        forward: Forward,
        stream: torch.cuda.Stream,
        *,
        nobody: int,
        ends_part: Callable[[int], bool],
    ) -> None:
        """`nobody` is the slot that no sequence has. `ends_part(layer)` says whether those who
        wait for layers are told of them when this one is stored.
        """
        self._forward = forward
        self._stream = stream
        self._nobody = nobody
        self._ends_part = ends_part
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepShape, _Recorded] = {}
        self._shapes: list[StepShape] = []

    def record(self, shapes: Collection[StepShape], progress: Callable[[], object]) -> None:
        """Record steps of these shapes, the largest first: its memory serves the others."""
        logits: Tensor | None = None
        most = max((shape.slots + shape.chunks for shape in shapes), default=0)
        for shape in sorted(shapes, key=lambda each: each.total_rows, reverse=True):
            with torch.cuda.stream(self._stream):
                device = self._stream.device
                numbers = torch.zeros(shape.size + NEWS_ROOM, dtype=torch.int64, device=device)
                numbers[: shape.size] = numbers_of_nobody(shape, self._nobody)
                # Kernels are compiled and libraries set up outside of the recording.
                out = self._forward(shape, numbers, padded=shape.rows > 0)
                if logits is None:
                    logits = out.new_empty((most, out.shape[1]))
                self._graphs[shape] = self._record(shape, numbers, logits[: len(out)])
            progress()
        self._shapes = sorted(self._graphs, key=self._cost)

    @property
    def is_recorded(self) -> bool:
        """Whether there is any graph."""
        return bool(self._graphs)

    def fitting(self, shape: StepShape) -> StepShape | None:
        """The recorded shape that holds a step at the least cost: not always the one with the
        fewest rows, as libraries have a better product for some numbers of rows than for others.
        """
        return next((each for each in self._shapes if each.holds(shape)), None)

    def numbers(self, shape: StepShape) -> Tensor:
        """Where a recorded step reads its numbers, (shape.size + NEWS_ROOM,) int64: behind them is
        what comes in the same copy.
        """
        return self._graphs[shape].numbers

    def replay(self, shape: StepShape, layer_done: LayerDone | None = None) -> Tensor:
        """See `Forward.__call__`; of a step without chunks no layer is told of. The logits stay
        until the next replay.
        """
        recorded = self._graphs[shape]
        recorded.replay(layer_done)
        return recorded.logits

    def _cost(self, shape: StepShape) -> tuple[float, int]:
        """Tenths of a millisecond that a replay takes at least, and rows, where that is the same.

        The first does not count: its launch may have kept the device waiting.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS)]  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for event in events:
                self._graphs[shape].replay()
                event.record()
        events[-1].synchronize()
        times = [one.elapsed_time(other) for one, other in pairwise(events)]
        return round(min(times), 1), shape.total_rows

    def _record(self, shape: StepShape, numbers: Tensor, logits: Tensor) -> _Recorded:
        self._stream.synchronize()
        recording = _Recording(self._pool, self._ends_part)
        layer_done = recording.layer_done if shape.chunks else None
        recording.begin()
        try:
            out = self._forward(shape, numbers, layer_done, padded=shape.rows > 0)
            logits.copy_(out)
        finally:
            recording.end()
        return _Recorded(recording.parts, recording.last_layers, numbers, logits)


def numbers_of_nobody(shape: StepShape, nobody: int) -> Tensor:
    """Of a step that reads and stores nothing, on the CPU; `nobody` is the slot of no sequence."""
    numbers = torch.empty(shape.size, dtype=torch.int64)
    StepPlan([], []).lay_out(shape, numbers.numpy(), nobody=nobody)
    return numbers
