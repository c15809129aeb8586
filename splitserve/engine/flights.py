"""Steps on their way: launched on an engine, read in their order."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from splitserve.engine.protocol import (
    DRAWN,
    AsyncEngine,
    Draw,
    DrawnToken,
    Engine,
    Launched,
    LayersDone,
    Slice,
)
from splitserve.engine.scheduler import Chunk


@dataclass(frozen=True)
class Flight:
    """A step that was launched at `began_s`, by the monotonic clock, and not read."""

    chunks: list[Chunk]
    began_s: float
    launched: Launched


_DRAWN = (DRAWN,)


class Flights:
    """At most `most_ahead` steps stay unread while the host goes on: none on an engine that
    computes while it is called.
    """

    def __init__(self, engine: Engine) -> None:
        self._block = engine.spec.block_tokens
        self._engine = engine
        self._launch = engine.launch if isinstance(engine, AsyncEngine) else self._compute
        self.most_ahead = 1 if isinstance(engine, AsyncEngine) else 0
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def take_off(self, chunks: list[Chunk], slices: list[Slice]) -> None:
        """Launch a step of these slices. Raises what the engine raises."""
        began_s = time.monotonic()
        layers_done = _layers_done(chunks, self._block)
        self._flights.append(Flight(chunks, began_s, self._launch(slices, layers_done)))

    @property
    def oldest(self) -> Flight:
        """The next one to be read; there must be one."""
        return self._flights[0]

    def next_down(self) -> Flight:
        """The oldest step, which is not in flight any more; its tokens are to be read."""
        return self._flights.popleft()

    def _compute(self, slices: list[Slice], layers_done: LayersDone | None) -> Launched:
        return _Computed(self._engine.step(slices, layers_done))


@dataclass(frozen=True)
class _Computed:
    """A step of an engine that computes while it is called."""

    drawn: list[list[DrawnToken]]

    def done(self) -> bool:
        return True

    def tokens(self) -> list[list[DrawnToken]]:
        return self.drawn


def slice_of(chunk: Chunk) -> Slice:
    """What an engine computes of a chunk that is about to be launched."""
    sequence = chunk.sequence
    draws: tuple[Draw, ...] = ()
    if chunk.is_last:
        draw = Draw(
            sequence.params,
            sequence.seed,
            sequence.choice,
            sequence.prompt,
            sequence.output,
            sequence.num_pending,
        )
        draws = (draw,)
        if sequence.prefill_choices:
            draws = tuple(draw._replace(choice=i) for i in range(sequence.prefill_choices))
    # The one token that may not be known is the one that the step before draws.
    tokens = _DRAWN if sequence.num_pending else sequence.tokens(chunk.start, chunk.end)
    return Slice(tokens, chunk.start, sequence.pages, draws, sequence.slot, sequence.came_from)


def whole_blocks(chunk: Chunk, block: int) -> tuple[int, int]:
    """The blocks [first, end) that the chunk completes; a prompt's partial last one counts."""
    return chunk.start // block, -(-chunk.end // block) if chunk.is_last else chunk.end // block


def _layers_done(chunks: list[Chunk], block: int) -> LayersDone | None:
    sinks = [(c.sequence.sink, *whole_blocks(c, block)) for c in chunks if c.sequence.sink]
    if not sinks:
        return None

    def notify(first_layer: int, end_layer: int) -> None:
        for sink, first_block, end_block in sinks:
            sink.layers_done(first_block, end_block, first_layer, end_layer)

    return notify
