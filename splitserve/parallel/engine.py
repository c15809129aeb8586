"""The engine of a tensor-parallel worker, as the rest of rank 0's process sees it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from splitserve.engine.protocol import DrawnToken, LayersDone, Slice
from splitserve.errors import Unavailable
from splitserve.parallel.ending import Ending
from splitserve.parallel.leader import Leader
from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.pages import GroupPages
from splitserve.parallel.rank import LeadingRank

_log = logging.getLogger(__name__)


class GroupEngine:
    """Implements `Engine` over all ranks.

    `own` is rank 0's part, whose `spec` is the worker's: pages that leave and enter here have all
    KV heads, whatever the group's size.
    """

    def __init__(
        self, own: LeadingRank, leader: Leader, slices: PageSlices, ending: Ending
    ) -> None:
        self.spec = own.spec
        self._own = own
        self._leader = leader
        self._ending = ending
        self._pages = GroupPages(own, leader.page_links, slices, ending)

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        report = _Report(layers_done)
        self._leader.send_step(slices, self.spec.block_tokens)
        try:
            logits = self._own.compute(slices, report if layers_done else None)
        except Unavailable:
            raise
        except Exception as error:
            # The others wait in this step for rank 0, and only the end of it frees them.
            _log.error("a forward pass over %d sequences failed", len(slices), exc_info=error)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._ending.fail(f"rank 0 failed, so this worker ends: {text}")
        # What fails from here on is rank 0's alone, and costs the requests of this step.
        report.raise_fault()
        return self._own.draw(logits, slices)

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        self._pages.export_page(page, first_layer, end_layer, out)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        self._pages.insert_page(page, content)

    def close(self) -> None:
        """Stop the other ranks. No method may be called after."""
        self._leader.dismiss()
        # Leaving a group may need all ranks at once (NCCL), so before waiting for them.
        self._own.close()
        self._leader.close()


class _Report:
    """Calls `LayersDone`; what it raises waits until the ranks have finished their step."""

    def __init__(self, layers_done: LayersDone | None) -> None:
        self._layers_done = layers_done
        self._fault: Exception | None = None

    def __call__(self, first_layer: int, end_layer: int) -> None:
        if self._layers_done is None or self._fault:
            return
        try:
            self._layers_done(first_layer, end_layer)
        except Exception as error:
            # From a thread that waits for a GPU it may come when the step has been left.
            _log.error("layers could not be reported", exc_info=error)
            self._fault = error

    def raise_fault(self) -> None:
        if self._fault:
            raise self._fault
