"""Digests of pages where they are, for the KV hand-over; see `page_digest_rules` for what they are.

Each program sums a part of one page; the few sums are added up and mixed on the host. What is read
once is all that bounds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.page_digest_rules import FIRST, LANES, SECOND, STEPS, WORD_BYTES, finish

_TILE = 1024
_TILES_A_PROGRAM = 8


def digest_pages(pool: Tensor, pages: Sequence[int], numbers: Tensor | None = None) -> list[bytes]:
    """16 bytes of each page. Waits for the device.

    pool: (num_pages, page_bytes) uint8, contiguous; page_bytes a multiple of 8
    numbers: (len(pages),) int64, the same pages where the pool is, for who has them there

    Raises `ValueError` for another shape or type, `IndexError` for a page that is not there.
    """
    if pool.dtype != torch.uint8 or not pool.is_contiguous() or pool.shape[1] % WORD_BYTES:
        raise ValueError("the pool must be contiguous uint8, its pages whole 64-bit words")
    if any(not 0 <= page < len(pool) for page in pages):
        raise IndexError(f"a page is not one of {len(pool)}")
    if not pages:
        return []
    words = pool.shape[1] // WORD_BYTES
    parts = triton.cdiv(words, _TILE * _TILES_A_PROGRAM)
    if numbers is None:
        numbers = torch.tensor(pages, dtype=torch.int64, device=pool.device)
    sums = torch.empty((len(pages), parts, LANES), dtype=torch.int64, device=pool.device)
    _sum_parts[(len(pages), parts)](
        pool.view(torch.int64),
        numbers,
        sums,
        words,
        STEP_0=STEPS[0],
        STEP_1=STEPS[1],
        FIRST_0=FIRST[0],
        FIRST_1=FIRST[1],
        SECOND_0=SECOND[0],
        SECOND_1=SECOND[1],
        TILE=_TILE,
        TILES=_TILES_A_PROGRAM,
        num_warps=4,
    )
    totals = sums.cpu().numpy().view(np.uint64).sum(1, dtype=np.uint64)
    return finish(totals, pool.shape[1])


@triton.jit(do_not_specialize_on_alignment=["pages"])
def _sum_parts(
    # pointers
    pool: tl.tensor,
    pages: tl.tensor,
    sums: tl.tensor,
    # sizes, in words
    size: tl.tensor,
    # constants
    STEP_0: tl.constexpr,
    STEP_1: tl.constexpr,
    FIRST_0: tl.constexpr,
    FIRST_1: tl.constexpr,
    SECOND_0: tl.constexpr,
    SECOND_1: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Both lanes' sums over `TILES` tiles of one page."""
    row, part = tl.program_id(0), tl.program_id(1)
    page = pool + tl.load(pages + row) * size
    lane_0 = tl.zeros((TILE,), tl.uint64)
    lane_1 = tl.zeros((TILE,), tl.uint64)
    for tile in range(TILES):
        columns = (part * TILES + tile) * TILE + tl.arange(0, TILE)
        inside = columns < size
        words = tl.load(page + columns, mask=inside, other=0).to(tl.uint64, bitcast=True)
        positions = (columns + 1).to(tl.uint64)
        lane_0 += tl.where(inside, _mix(words ^ (positions * STEP_0), FIRST_0, SECOND_0), 0)
        lane_1 += tl.where(inside, _mix(words ^ (positions * STEP_1), FIRST_1, SECOND_1), 0)
    out = sums + (row * tl.num_programs(1) + part) * 2
    tl.store(out, tl.sum(lane_0.to(tl.int64, bitcast=True), 0))
    tl.store(out + 1, tl.sum(lane_1.to(tl.int64, bitcast=True), 0))


@triton.jit
def _mix(words: tl.tensor, FIRST_FACTOR: tl.constexpr, SECOND_FACTOR: tl.constexpr) -> tl.tensor:
    words = (words ^ (words >> 32)) * FIRST_FACTOR
    words = (words ^ (words >> 29)) * SECOND_FACTOR
    return words ^ (words >> 32)
