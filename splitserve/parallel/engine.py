"""The engine of a tensor-parallel worker, as the rest of rank 0's process sees it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from splitserve.engine.protocol import DrawnToken, Engine, EngineSpec, LayersDone, Slice
from splitserve.errors import Unavailable
from splitserve.parallel.ending import Ending
from splitserve.parallel.leader import Leader
from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.pages import GroupPages

_log = logging.getLogger(__name__)


class GroupEngine:
    """Implements `Engine` over all ranks.

    `own` is rank 0's part: it computes a step together with the other ranks, samples, and
    exports and inserts pages of its own KV heads. `spec` is the worker's: its pages have all KV
    heads, whatever the group's size.

    When `layers_done` is called every rank has written its KV of these layers: rank 0 has by then
    the sum of a later part of the same layer from all of them.
    """

    def __init__(
        self, own: Engine, spec: EngineSpec, leader: Leader, slices: PageSlices, ending: Ending
    ) -> None:
        self.spec = spec
        self._own = own
        self._leader = leader
        self._ending = ending
        self._pages = GroupPages(own, leader.page_links, slices, spec.num_layers, ending)

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        self._leader.send_step(slices, self.spec.block_tokens)
        try:
            return self._own.step(slices, layers_done)
        except Unavailable:
            raise
        except Exception as error:
            # The others wait in this step for rank 0, and only the end of it frees them.
            _log.error("a forward pass over %d sequences failed", len(slices), exc_info=error)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._ending.fail(f"rank 0 failed, so this worker ends: {text}")

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        self._pages.export_page(page, first_layer, end_layer, out)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        self._pages.insert_page(page, content)

    def close(self) -> None:
        """Stop the other ranks. No method may be called after."""
        self._leader.close()
