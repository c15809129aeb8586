"""Plans that `linear.py --tune` tries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from splitserve_kernels.small_tiles import TilePlan, pad_rows

PROCESSORS = 132
FEW_ROWS = 16
TILES: dict[str, list[tuple[int, int, int, int]]] = {
    # block_n, block_k, stages, warps
    "bf16": [(64, 128, 3, 4), (64, 128, 4, 4), (64, 256, 3, 4), (64, 256, 4, 4), (128, 128, 4, 8)],
    "fp8": [(64, 256, 3, 4), (64, 256, 4, 4), (64, 256, 7, 4), (64, 128, 8, 4), (128, 256, 4, 8)],
    "int8": [(64, 128, 4, 2), (64, 128, 5, 2), (64, 64, 6, 2), (64, 128, 3, 4)],
    "int4": [(64, 128, 3, 2), (64, 128, 4, 2), (64, 128, 3, 4), (128, 128, 3, 4)],
    "int4g32": [
        (64, 128, 2, 2),
        (64, 128, 3, 2),
        (64, 64, 4, 2),
        (128, 64, 4, 4),
        (128, 128, 3, 4),
    ],
}
WIDE_TILES = {
    "bf16": [(64, 128, 4, 4), (64, 128, 6, 4), (64, 256, 3, 4), (128, 64, 6, 8), (128, 128, 3, 8)],
    "fp8": [(64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 5, 4), (128, 128, 5, 8)],
}
"""For more than FEW_ROWS, where reading x costs too."""


def plans(kind: str, m: int, n: int, k: int, *, gated: bool) -> Iterator[TilePlan]:
    """Tiles in splits that fill the device or nearly."""
    precise = 128 if kind == "fp8" else 0
    tiles_of = TILES if m <= FEW_ROWS else {**TILES, **WIDE_TILES}
    for block_n, block_k, stages, warps in tiles_of[kind]:
        height = block_n // 2 if gated and block_n > 64 else block_n
        tiles = n // 2 // height if gated else n // height
        for splits in _splits(tiles, k, block_k):
            yield TilePlan(
                *(pad_rows(m, 16), height, block_k, splits, warps, stages, 4),
                precise_k=precise,
            )


def neighbours(plan: TilePlan, *, integers: bool) -> list[TilePlan]:
    """The same with other depths and prefetches, and with a tensor descriptor."""
    return [
        replace(plan, prefetch_lines=0),
        replace(plan, prefetch_lines=16),
        replace(plan, num_stages=plan.num_stages + 1),
        replace(plan, num_stages=max(2, plan.num_stages - 1)),
        *([] if integers else [replace(plan, tma=True)]),
    ]


def _splits(tiles: int, k: int, block_k: int) -> list[int]:
    """The first that all but fill the device, and twice as many."""
    fits = [s for s in (1, 2, 4, 8) if k // block_k >= 4 * s]
    full = [s for s in fits if tiles * s >= 0.7 * PROCESSORS]
    return full[:2] or fits[-1:]
