"""Which steps are recorded as graphs.

Without a graph a step costs the host 10 to 40 ms. What keeps the device busy for longer than that
needs none. A step takes the least graph that holds it, so the steps between two sizes are padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from splitserve.engine.cuda.layout import StepShape

_SLOTS = (8, 32, 64, 128, 192, 256)
_SLOTS_BESIDE_FEW_ROWS = (16, 48, 80, 96, 112, 160, 224)
_FEW_ROWS = (32, 64, 128, 192, 256)
_ROWS = (384, 512, 768, 1024)
_ROWS_BESIDE_FEW_SLOTS = (1536, 2048)
_CHUNKS = 16


def graph_shapes(max_batch: int, max_step_tokens: int) -> list[StepShape]:
    """Steps that decode, padded by three rows or an eighth; steps that compute chunks of prompts
    beside, padded by some tens of rows, and by next to none if they are full; steps of prompts
    with few who decode, as a prefill worker has them. None that can never come.
    """
    shapes = [StepShape(size) for size in _decode_sizes(max_batch)]
    sizes = sorted(size for size in (*_SLOTS, *_SLOTS_BESIDE_FEW_ROWS) if size < max_batch)
    for below, slots in pairwise((0, *sizes, max_batch)):
        decoding = below + 1 if below else 0
        for rows in _rows_beside(slots, max_step_tokens - decoding):
            shapes.append(StepShape(slots, rows, _CHUNKS))
    return shapes


def _rows_beside(slots: int, most: int) -> Iterator[int]:
    """Rows of chunks beside so many slots, in steps that have no more than `most`."""
    sizes = [*_FEW_ROWS]
    if slots not in _SLOTS_BESIDE_FEW_ROWS:
        sizes += _ROWS
    if slots <= _SLOTS[0]:
        sizes += _ROWS_BESIDE_FEW_SLOTS
    yield from (rows for rows in sizes if rows < most)
    if 0 < most <= _ROWS[-1]:
        yield most  # a prompt that is longer fills the step
    elif most <= sizes[-1]:
        yield min(rows for rows in sizes if rows >= most)


def _decode_sizes(max_batch: int) -> list[int]:
    sizes = {1, 2, 3, 4, 6, max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += max(4, size // 8 // 4 * 4)
    return sorted(size for size in sizes if size <= max_batch)
