"""Brings a table of slots up to date in one launch: tokens that have moved, pages that are new."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 256


def apply_slot_news(
    tokens: Tensor, pages: Tensor, news: Tensor, num_moves: int, num_pages: int
) -> None:
    """Give slots the tokens of others, and places of the table their page numbers, in place.

    tokens: (slots,) int64
    pages: int32, contiguous
    news: (2 * num_moves + 2 * num_pages,) int64: the slots that tokens are taken from, all of them
        before the first is given; those that get them, no one twice; places in the flattened
        `pages`, no one twice; their page numbers

    Raises `ValueError` for a type or size that does not fit.
    """
    if tokens.dtype != torch.int64 or news.dtype != torch.int64 or pages.dtype != torch.int32:
        raise ValueError("tokens and news must be int64, pages int32")
    if len(news) != 2 * num_moves + 2 * num_pages:
        raise ValueError(f"{len(news)} numbers for {num_moves} moves and {num_pages} pages")
    if num_moves > len(tokens):
        raise ValueError(f"{num_moves} moves among {len(tokens)} slots")
    if not (tokens.is_contiguous() and pages.is_contiguous() and news.is_contiguous()):
        raise ValueError("tokens, pages and news must be contiguous")
    _apply[(1 + triton.cdiv(num_pages, _TILE),)](
        tokens,
        pages,
        news,
        num_moves,
        num_pages,
        MOST_MOVES=triton.next_power_of_2(len(tokens)),
        TILE=_TILE,
        num_warps=4,
    )


def apply_slot_news_reference(
    tokens: Tensor, pages: Tensor, news: Tensor, num_moves: int, num_pages: int
) -> None:
    """`apply_slot_news` in plain torch."""
    parts = torch.split(news, [num_moves, num_moves, num_pages, num_pages])
    before, after, places, numbers = parts
    tokens[after] = tokens[before]
    pages.view(-1)[places] = numbers.to(torch.int32)


@triton.jit(do_not_specialize=["moves", "count"])
def _apply(
    # pointers
    tokens: tl.tensor,
    pages: tl.tensor,
    news: tl.tensor,
    # sizes
    moves: tl.tensor,
    count: tl.tensor,
    # constants
    MOST_MOVES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The first program moves tokens, each other one writes a tile of pages."""
    program = tl.program_id(0)
    if program == 0:
        move = tl.arange(0, MOST_MOVES)
        before = tl.load(news + move, mask=move < moves)
        after = tl.load(news + moves + move, mask=move < moves)
        token = tl.load(tokens + before, mask=move < moves)
        # A slot may both give a token and get one.
        tl.debug_barrier()
        tl.store(tokens + after, token, mask=move < moves)
    else:
        news += 2 * moves
        page = (program - 1) * TILE + tl.arange(0, TILE)
        place = tl.load(news + page, mask=page < count)
        number = tl.load(news + count + page, mask=page < count)
        tl.store(pages + place, number.to(tl.int32), mask=page < count)
