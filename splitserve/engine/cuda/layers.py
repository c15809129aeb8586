"""Tells when the device has computed a group of layers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from splitserve.engine.protocol import LayersDone

_log = logging.getLogger(__name__)


class LayerReports:
    """A thread that waits for the device, so that the host need not."""

    def __init__(self) -> None:
        self._events: SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = (
            SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="layer-reports", daemon=True)
        self._thread.start()

    def when_computed(self, layers_done: LayersDone | None) -> LayersDone | None:
        """The same as seen by who launches: each call is passed on once what has been launched on
        the current stream until then is computed.
        """
        if layers_done is None:
            return None

        def launched(first_layer: int, end_layer: int) -> None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events.put((event, lambda: layers_done(first_layer, end_layer)))

        return launched

    def close(self) -> None:
        """End the thread after what it has been given."""
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (waiting := self._events.get()) is not None:
            event, tell = waiting
            try:
                event.synchronize()
                tell()
            except Exception:
                _log.exception("layers could not be reported")
