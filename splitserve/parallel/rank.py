"""One rank's part of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from splitserve.engine.protocol import DrawnToken, EngineSpec, LayersDone, Slice
from splitserve.parallel.pages import RankPages


class RankEngine(RankPages, Protocol):
    """What every rank has. Its pages have its own KV heads alone; `spec` is the worker's."""

    spec: EngineSpec

    def compute(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> Tensor | None:
        """The part of a step that all ranks compute together: the logits of all draws.

        When `layers_done` is called every rank has these layers' keys and values in its pool.
        """
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class LeadingRank(RankEngine, Protocol):
    """Rank 0's part: it draws, too."""

    def draw(self, logits: Tensor | None, slices: Sequence[Slice]) -> list[list[DrawnToken]]:
        """The tokens of each slice, in its draws' order."""
        ...
