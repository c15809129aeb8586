"""The greatest logit's token of each row, by several programs a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
_PROGRAMS = 512
"""About four for each processor of a Hopper GPU."""
_MOST_SPLITS = 64

_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


def argmax_rows(logits: Tensor) -> Tensor:
    """(rows,) int64: the token of each row's greatest logit, the lowest of equal ones.

    logits: (rows, vocab), a 16-bit type or fp32, contiguous in the last dimension. A NaN is
        never the greatest; a row of nothing else gives 0.

    Raises `ValueError` for a shape or type that is not supported.
    """
    check_logits(logits)
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    splits = triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows))
    splits = min(splits, _MOST_SPLITS, triton.next_power_of_2(triton.cdiv(vocab, _TILE)))
    tiles = triton.cdiv(triton.cdiv(vocab, splits), _TILE)
    if splits == 1:
        _argmax[(rows, 1)](
            logits, None, out, logits.stride(0), tiles, VOCAB=vocab, TILE=_TILE, num_warps=4
        )
        return out
    peaks = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    _argmax[(rows, splits)](
        logits, peaks, tokens, logits.stride(0), tiles, VOCAB=vocab, TILE=_TILE, num_warps=4
    )
    _reduce[(rows,)](peaks, tokens, out, SPLITS=splits, num_warps=1)
    return out


def argmax_rows_reference(logits: Tensor) -> Tensor:
    """The same in plain torch."""
    return logits.argmax(dim=-1)


def check_logits(logits: Tensor) -> None:
    """Raise `ValueError` unless these are (rows, vocab) in a supported type, rows contiguous."""
    if logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"expected contiguous rows, got {tuple(logits.shape)} by {logits.stride()}"
        )
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"type {logits.dtype} is not supported")


@triton.jit
def lowest_of(hits: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The lowest of (tile,) `tokens` where `hits`, or 2^31 - 1."""
    return tl.min(tl.where(hits, tokens, _NO_TOKEN), 0)


@triton.jit(do_not_specialize=["tiles"])
def _argmax(
    # pointers; peaks is None for a row of one split
    logits: tl.tensor,
    peaks: tl.tensor,
    tokens: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # sizes
    tiles: tl.tensor,
    # constants
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One split of one row: `tiles` tiles of it, fewer at its end."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * stride
    first = split * tiles * TILE
    peak = tl.full([TILE], float("-inf"), tl.float32)
    token = tl.full([TILE], 0, tl.int32)
    for start in range(first, tl.minimum(first + tiles * TILE, VOCAB), TILE):
        columns = start + tl.arange(0, TILE)
        part = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf"))
        part = part.to(tl.float32)
        token = tl.where(part > peak, columns, token)
        peak = tl.where(part > peak, part, peak)
    greatest = tl.max(peak, 0)
    # A lane that saw nothing above -inf names token 0.
    lowest = lowest_of(peak == greatest, token)
    if peaks is None:
        tl.store(tokens + row, lowest.to(tl.int64))
    else:
        place = row * tl.num_programs(1) + split
        tl.store(peaks + place, greatest)
        tl.store(tokens + place, lowest)


@triton.jit
def _reduce(
    # pointers
    peaks: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    # constants
    SPLITS: tl.constexpr,
) -> None:
    """The greatest of one row's splits."""
    row = tl.program_id(0).to(tl.int64)
    places = row * SPLITS + tl.arange(0, SPLITS)
    peak = tl.load(peaks + places)
    token = tl.load(tokens + places)
    tl.store(out + row, lowest_of(peak == tl.max(peak, 0), token).to(tl.int64))
