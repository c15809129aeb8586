"""Going over a sequence's tokens in the pool, as numbers or as codes of 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.paged_kv import CODE_TYPES, load_rows
from splitserve_kernels.paged_rules import attend_tile

# How keys and values lie in the pool: as numbers, or as words of four codes.
PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)


def as_words(pool: Tensor) -> tuple[Tensor, int]:
    """Keys or values as the kernels take them, and what they are. Raises `ValueError`."""
    if pool.dtype not in CODE_TYPES:
        return pool, PLAIN.value
    if pool.shape[3] % 4:
        raise ValueError(f"head_dim {pool.shape[3]} is no multiple of 4, as codes of 8 bits need")
    return pool.view(torch.int32), (INT8 if pool.dtype == torch.int8 else FP8).value


@triton.jit
def _decode_words(words: tl.tensor, CODES: tl.constexpr) -> tl.tensor:
    """(rows, 4 * words) fp16 from words of four codes: int8, or fp8 as 2^-8 of what it stands for.

    Without conversions, two codes at a time: an int8 plus 128 is the last bits of the fp16 number
    1152 above it, and sign, exponent and fraction of an fp8 are those of an fp16 with another bias.
    """
    if CODES == INT8:
        shifted = words ^ -0x7F7F7F80
        even = (shifted & 0x00FF00FF) | 0x64006400
        odd = ((shifted >> 8) & 0x00FF00FF) | 0x64006400
    else:
        left = words << 8
        even = (left & -0x7FFF8000) | ((left & 0x7F007F00) >> 1)
        odd = (words & -0x7FFF8000) | ((words & 0x7F007F00) >> 1)
    first, third = _halves(even)
    second, fourth = _halves(odd)
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    codes = tl.reshape(pairs, [words.shape[0], words.shape[1] * 4])
    if CODES == INT8:
        codes -= 1152.0
    return codes


@triton.jit
def _halves(words: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The lower and the upper 16 bits as fp16."""
    lower = words.to(tl.int16).to(tl.float16, bitcast=True)
    return lower, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def attend_pages(
    # state
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    # queries
    q: tl.tensor,
    row_scale: tl.tensor,
    positions: tl.tensor,
    # rules
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    slopes: tl.tensor,
    window: tl.tensor,
    # tokens
    first: tl.tensor,
    end: tl.tensor,
    least: tl.tensor,
    # pointers
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    # strides, in elements
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    # constants
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Go over tokens [first, end) of one sequence in the pool.

    `table` points at the sequence's row of the page table, the others at the head in page 0. Keys
    and values with CODES are words of four. Tokens before `least` are not read. Without MASKED the
    number of tokens is a multiple of TILE_TOKENS.
    """
    tokens = first + tl.arange(0, TILE_TOKENS)
    live = (tokens < end) & (tokens >= least)
    pages = tl.load(table + tokens // BLOCK_TOKENS, mask=live, other=0)
    if CODES == PLAIN:
        # Page numbers are loaded a tile ahead and carried as they are: only then does the compiler
        # have the keys and values of the next tiles under way.
        for start in tl.range(first, end, TILE_TOKENS, num_stages=STAGES):
            tokens = start + tl.arange(0, TILE_TOKENS)
            live = (tokens < end) & (tokens >= least)
            slots = tokens % BLOCK_TOKENS
            # A pool may hold more elements than 32 bits can count.
            wide = pages.to(tl.int64)
            key_rows = wide * key_page_stride + slots * key_token_stride
            value_rows = wide * value_page_stride + slots * value_token_stride
            k = load_rows(keys, key_rows, live, MASKED, HEAD_DIM, TILE_DIM)
            v = load_rows(values, value_rows, live, MASKED, HEAD_DIM, TILE_DIM)
            ahead = tokens + TILE_TOKENS
            pages = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < end, other=0)
            peak, total, mixed = attend_tile(
                peak,
                total,
                mixed,
                q,
                k,
                v,
                row_scale,
                None,
                None,
                score_scale,
                soft_cap,
                slopes,
                window,
                tokens,
                live,
                positions,
                MASKED,
                CAUSAL=CAUSAL,
            )
    else:
        # The compiler does not overlap loads that are decoded: a tile's codes and scales are loaded
        # while the one before is computed, its page numbers while the one before that is.
        k, v, key_scale, value_scale = _load_codes(
            keys,
            values,
            key_scales,
            value_scales,
            pages,
            tokens % BLOCK_TOKENS,
            live,
            key_page_stride,
            key_token_stride,
            value_page_stride,
            value_token_stride,
            scale_page_stride,
            scale_token_stride,
            CODES,
            HEAD_DIM,
            TILE_DIM,
        )
        ahead = tokens + TILE_TOKENS
        pages = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < end, other=0)
        for start in tl.range(first, end, TILE_TOKENS, num_stages=1):
            tokens = start + tl.arange(0, TILE_TOKENS)
            ahead = tokens + TILE_TOKENS
            next_k, next_v, next_key_scale, next_value_scale = _load_codes(
                keys,
                values,
                key_scales,
                value_scales,
                pages,
                ahead % BLOCK_TOKENS,
                ahead < end,
                key_page_stride,
                key_token_stride,
                value_page_stride,
                value_token_stride,
                scale_page_stride,
                scale_token_stride,
                CODES,
                HEAD_DIM,
                TILE_DIM,
            )
            ahead += TILE_TOKENS
            pages = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < end, other=0)
            peak, total, mixed = attend_tile(
                peak,
                total,
                mixed,
                q,
                _decode_words(k, CODES).to(q.dtype),
                _decode_words(v, CODES).to(q.dtype),
                row_scale,
                key_scale,
                value_scale,
                score_scale,
                soft_cap,
                slopes,
                window,
                tokens,
                (tokens < end) & (tokens >= least),
                positions,
                MASKED,
                CAUSAL=CAUSAL,
            )
            k, v, key_scale, value_scale = next_k, next_v, next_key_scale, next_value_scale
    return peak, total, mixed


@triton.jit
def _load_codes(
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    pages: tl.tensor,
    slots: tl.tensor,
    live: tl.tensor,
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Words of tokens' keys and values, and their scales in fp32, as they go with
    `_decode_words`.
    """
    unit: tl.constexpr = 1.0 if CODES == INT8 else 256.0
    wide = pages.to(tl.int64)
    key_rows = wide * key_page_stride + slots * key_token_stride
    value_rows = wide * value_page_stride + slots * value_token_stride
    k = load_rows(keys, key_rows, live, True, HEAD_DIM // 4, TILE_DIM // 4)
    v = load_rows(values, value_rows, live, True, HEAD_DIM // 4, TILE_DIM // 4)
    rows = wide * scale_page_stride + slots * scale_token_stride
    key_scale = tl.load(key_scales + rows, mask=live, other=0.0).to(tl.float32) * unit
    value_scale = tl.load(value_scales + rows, mask=live, other=0.0).to(tl.float32) * unit
    return k, v, key_scale, value_scale
