"""Carries the core's outputs from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from splitserve.engine.sequence import SequenceOutput


class Step(NamedTuple):
    """A step of the core: its number, and when it was over in Unix nanoseconds."""

    number: int
    ended_ns: int


OnOutput = Callable[[Step, SequenceOutput], None]
"""Called on the event loop as `on_output(step, output)`. Must not raise or wait."""

_log = logging.getLogger(__name__)


class OutputRelay:
    """The core's `StepListener`. One wake-up of the event loop a step, whatever the batch.

    All outputs of a step are delivered in one turn of the loop, so that a writer woken by the
    first of them finds all.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._subscribers: dict[str, OnOutput] = {}

    def __call__(self, number: int, outputs: Sequence[SequenceOutput]) -> None:
        """Post a step's outputs. Called on the engine's thread when it is over."""
        if outputs:
            step = Step(number, time.time_ns())
            try:
                self._loop.call_soon_threadsafe(self._deliver, step, outputs)
            except RuntimeError:
                _log.debug("outputs of step %d dropped: the event loop has closed", number)

    def subscribe(self, sequence_id: str, on_output: OnOutput) -> None:
        """Deliver the sequence's outputs to `on_output`. Call before `EngineCore.submit`."""
        if sequence_id in self._subscribers:
            raise ValueError(f"sequence {sequence_id!r} has a subscriber already")
        self._subscribers[sequence_id] = on_output

    def unsubscribe(self, sequence_id: str) -> None:
        """Drop whatever still comes of the sequence. Idempotent."""
        self._subscribers.pop(sequence_id, None)

    def _deliver(self, step: Step, outputs: Sequence[SequenceOutput]) -> None:
        for output in outputs:
            subscriber = self._subscribers.get(output.sequence.id)
            if subscriber is None:
                continue
            try:
                subscriber(step, output)
            except Exception:
                _log.exception("an output of sequence %s was lost", output.sequence.id)
