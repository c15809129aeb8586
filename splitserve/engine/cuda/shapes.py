"""Which steps are recorded as graphs.

Without a graph a step costs the host 10 to 40 ms. What keeps the device busy for longer than that
needs none. A step takes the least graph that holds it, so the steps between two sizes are padded.
"""

from __future__ import annotations

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
    beside, less finely, but for those whose chunks fill up what the batch leaves of the step;
    steps of prompts with few who decode, as a prefill worker has them. None that can never come.
    """
    shapes = [StepShape(size) for size in _decode_sizes(max_batch)]
    sizes = sorted(size for size in (*_SLOTS, *_SLOTS_BESIDE_FEW_ROWS) if size < max_batch)
    for below, slots in pairwise((0, *sizes, max_batch)):
        only_few_rows = slots in _SLOTS_BESIDE_FEW_ROWS and slots < max_batch
        rows = _few_rows(max_step_tokens) if only_few_rows else _rows(slots, max_step_tokens)
        decoding = below + 1 if below else 0
        if max_step_tokens - decoding <= _ROWS[-1]:
            rows.add(max_step_tokens - decoding)
        shapes += [StepShape(slots, each, _CHUNKS) for each in sorted(rows)]
    return shapes


def _few_rows(most: int) -> set[int]:
    return {rows for rows in _FEW_ROWS if rows < most}


def _rows(slots: int, most: int) -> set[int]:
    """Among them one that holds `most`, if that is not too many: prompts under way have slots, too,
    so that few may decode in a step of many slots.
    """
    sizes = [*_ROWS, *(_ROWS_BESIDE_FEW_SLOTS if slots <= _SLOTS[0] else ())]
    rows = _few_rows(most) | {each for each in sizes if each < most}
    if most <= _ROWS[-1]:
        rows.add(most)
    elif most <= sizes[-1]:
        rows.add(min(each for each in sizes if each >= most))
    return rows


def _decode_sizes(max_batch: int) -> list[int]:
    sizes = {1, 2, 3, 4, 6, max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += max(4, size // 8 // 4 * 4)
    return sorted(size for size in sizes if size <= max_batch)
