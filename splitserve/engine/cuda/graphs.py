"""CUDA graphs of steps: a launch of one, instead of some hundreds, for shapes that come often."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.layout import StepPlan, StepShape


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    logits: Tensor


class StepGraphs:
    """Graphs by shape. All share one pool of memory, which is safe as they run one after the other
    and what outlives a replay is copied out of it.
    """

    def __init__(self, forward: Forward, stream: torch.cuda.Stream, *, nobody: int) -> None:
        """`nobody` is the slot that no sequence has."""
        self._forward = forward
        self._stream = stream
        self._nobody = nobody
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepShape, _Recorded] = {}
        self._shapes: list[StepShape] = []

    def record(self, shapes: Collection[StepShape], progress: Callable[[], object]) -> None:
        """Record steps of these shapes, the largest first: its memory serves the others."""
        logits: Tensor | None = None
        most = max((shape.slots + shape.chunks for shape in shapes), default=0)
        for shape in sorted(shapes, key=lambda each: each.total_rows, reverse=True):
            with torch.cuda.stream(self._stream):
                numbers = numbers_of_nobody(shape, self._nobody).to(self._stream.device)
                # Kernels are compiled and libraries set up outside of the recording.
                out = self._forward(shape, numbers, padded=shape.rows > 0)
                if logits is None:
                    logits = out.new_empty((most, out.shape[1]))
                self._graphs[shape] = self._record(shape, numbers, logits[: len(out)])
            progress()
        self._shapes = sorted(self._graphs, key=lambda each: each.total_rows)

    @property
    def is_recorded(self) -> bool:
        """Whether there is any graph."""
        return bool(self._graphs)

    def fitting(self, shape: StepShape) -> StepShape | None:
        """The least recorded shape that holds a step."""
        return next((each for each in self._shapes if each.holds(shape)), None)

    def numbers(self, shape: StepShape) -> Tensor:
        """Where a recorded step reads its numbers, (shape.size,) int64."""
        return self._graphs[shape].numbers

    def replay(self, shape: StepShape) -> Tensor:
        """See `Forward.__call__`. The logits stay until the next replay."""
        recorded = self._graphs[shape]
        recorded.graph.replay()
        return recorded.logits

    def _record(self, shape: StepShape, numbers: Tensor, logits: Tensor) -> _Recorded:
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool)
        try:
            logits.copy_(self._forward(shape, numbers, padded=shape.rows > 0))
        finally:
            graph.capture_end()
        return _Recorded(graph, numbers, logits)


def numbers_of_nobody(shape: StepShape, nobody: int) -> Tensor:
    """Of a step that reads and stores nothing, on the CPU; `nobody` is the slot of no sequence."""
    numbers = torch.empty(shape.size, dtype=torch.int64)
    StepPlan([], []).lay_out(shape, numbers.numpy(), nobody=nobody)
    return numbers
