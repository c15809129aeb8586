"""Tells when the device has computed a group of layers."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import torch

from splitserve.engine.protocol import EngineSpec, LayersDone

_log = logging.getLogger(__name__)


class LayerReports:
    """A thread that waits for the device, so that the host need not."""

    def __init__(self, spec: EngineSpec, *, shared: bool) -> None:
        """`shared`: other ranks compute with this one, and a layer is only done when theirs is."""
        self._group = spec.layer_group
        self._num_layers = spec.num_layers
        self._shared = shared
        self._events: SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = (
            SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="layer-reports", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def of_step(self, layers_done: LayersDone | None) -> Iterator[Callable[[int], None] | None]:
        """What the model calls as it has launched each layer's storing; None if nobody waits."""
        if layers_done is None:
            yield None
            return
        report = self._report(layers_done)
        if not self._shared:
            yield report
            return
        # This rank having stored a layer says nothing of the others. Once it has stored the one
        # after it, it has their sums of that layer, which they gave after they had stored it.
        yield lambda layer: report(layer - 1)
        report(self._num_layers - 1)

    def close(self) -> None:
        """End the thread after what it has been given."""
        self._events.put(None)
        self._thread.join()

    def _report(self, layers_done: LayersDone) -> Callable[[int], None]:
        def report(layer: int) -> None:
            end = layer + 1
            if end and (end % self._group == 0 or end == self._num_layers):
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
                first = layer // self._group * self._group
                self._events.put((event, lambda: layers_done(first, end)))

        return report

    def _run(self) -> None:
        while (waiting := self._events.get()) is not None:
            event, tell = waiting
            try:
                event.synchronize()
                tell()
            except Exception:
                _log.exception("layers could not be reported")
