"""Causal attention of chunks of several sequences over a paged pool.

A program keeps a tile of queries and goes over the keys it may see with an online softmax; only
tiles that touch the diagonal or a window's edge are masked. All query heads of a KV head share a
tile, so that keys and values are read once for them. A chunk's own keys and values are in the pool
before it is attended to, so the pool alone is enough; where they are given as plain tensors too,
they come by the tensor memory accelerator, which needs no addresses of rows.

Tiles of all sequences lie in one flat grid, whose size depends on shapes alone: sequence s begins
at tile query_starts[s] * group / TILE_ROWS + s, which leaves it room for its last tile. So the grid
has at most one idle tile a sequence, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from splitserve_kernels.paged_kv import check_pool, gather, scale_strides, tile_dim
from splitserve_kernels.paged_rules import (
    LEAST,
    attend_tile,
    finish,
    load_learned,
    load_query,
    reference_rows,
    score_numbers,
)
from splitserve_kernels.paged_tokens import PLAIN, as_words, attend_pages

_TILE_SEQUENCES = 64
"""Of those that a program looks through for its own at a time; one size, so that one kernel is
compiled for any number of chunks.
"""


def paged_prefill(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write the mixed values of every query into `out`.

    queries, out: (rows, heads, head_dim), contiguous in the last dimension
    keys, values, key_scales, value_scales, page_table: see `paged_kv`
    query_starts: (sequences + 1,) int32 or int64; sequence s has rows
        [query_starts[s], query_starts[s + 1]), which are its last tokens. Rows of no sequence are
        left as they are.
    lengths: (sequences,) int32 or int64, tokens in all, those of the queries included
    new_keys, new_values: (rows, kv_heads, head_dim), what the pool has of the rows; only for speed,
        and not read where the pool holds codes.
    scale, window, soft_cap, slopes, sinks: see `paged_decode`

    Raises `ValueError` for shapes, types and numbers that do not go together.
    """
    check_pool(queries, keys, values, page_table, out, key_scales, value_scales)
    rows, heads, head_dim = queries.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    numbers = score_numbers(heads, head_dim, scale, window, soft_cap, slopes, sinks)
    sequences = page_table.shape[0]
    tiles = _tiles(tile_dim(head_dim), queries.element_size())
    described = [
        _describe(new, keys, [tiles["TILE_TOKENS"], head_dim]) for new in (new_keys, new_values)
    ]
    keys, codes = as_words(keys)
    values, _ = as_words(values)
    num_tiles = rows * group // tiles["TILE_ROWS"] + sequences
    _attend_rows[(num_tiles * kv_heads,)](
        queries,
        keys,
        values,
        key_scales,
        value_scales,
        *(described if None not in described else (None, None)),
        slopes,
        sinks,
        page_table,
        query_starts,
        lengths,
        out,
        numbers.score_scale,
        numbers.soft_cap,
        window,
        sequences,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        *scale_strides(key_scales),
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        CODES=codes,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=keys.shape[1],
        TILE_SEQUENCES=_TILE_SEQUENCES,
        TILE_DIM=tile_dim(head_dim),
        **tiles,
    )


def paged_prefill_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, a sequence at a time: (rows, heads, head_dim) in fp32."""
    _, heads, _ = queries.shape
    out = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    starts = query_starts.tolist()
    for i, length in enumerate(lengths.tolist()):
        rows = slice(starts[i], starts[i + 1])
        past = length - (starts[i + 1] - starts[i])
        first = 0 if window is None else max(0, past + 1 - window)
        tokens = torch.arange(first, length, device=queries.device)
        seen = (page_table[i], first, length, heads)
        out[rows] = reference_rows(
            queries[rows],
            gather(keys, key_scales, *seen),
            gather(values, value_scales, *seen),
            tokens - torch.arange(past, length, device=queries.device)[:, None],
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            slopes=slopes,
            sinks=sinks,
        )
    return out


def _describe(new: Tensor | None, pool: Tensor, box: list[int]) -> TensorDescriptor | None:
    """`new` as (rows, kv_heads * head_dim) for the tensor memory accelerator, None if it cannot be
    read so.
    """
    if new is None or new.dtype != pool.dtype:
        return None
    rows, kv_heads, head_dim = new.shape
    row_bytes, size = new.stride(0) * new.element_size(), head_dim * new.element_size()
    if new.stride()[1:] != (head_dim, 1) or row_bytes % 16 or new.data_ptr() % 16 or size % 32:
        return None
    if head_dim < 16 or head_dim & (head_dim - 1):
        return None
    return TensorDescriptor(new, [rows, kv_heads * head_dim], [new.stride(0), 1], box)


def _tiles(dim: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes that fit a Hopper GPU.

    For heads of up to 128 a tile is one warp group's, so that of the two or three programs on a
    processor one multiplies while another takes exponents: 455 TFLOP/s, against 381 with 128 rows
    (Llama-3.1-8B's heads, 4k tokens, H100).
    """
    if element_size == 4:
        rows = 64 if dim <= 128 else 32
        return {"TILE_ROWS": rows, "TILE_TOKENS": 32, "STAGES": 1, "num_warps": 4}
    if dim <= 128:
        return {"TILE_ROWS": 64, "TILE_TOKENS": 64, "STAGES": 3, "num_warps": 4}
    return {"TILE_ROWS": 128, "TILE_TOKENS": 64, "STAGES": 2, "num_warps": 8}


@triton.jit(do_not_specialize=["table_stride", "window", "sequences"])
def _attend_rows(
    # pointers
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    slopes: tl.tensor,
    sinks: tl.tensor,
    page_table: tl.tensor,
    query_starts: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    # numbers
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    sequences: tl.tensor,
    # strides, in elements
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    scale_head_stride: tl.tensor,
    table_stride: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    # constants
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_SEQUENCES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """A tile of one sequence's queries for one KV head.

    A tile's rows are (query, head of the group) pairs, queries first. A sequence's tiles with the
    most to see start first, so that the grid's end is short work.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    place = (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS
    sequence = -1
    for at in range(0, sequences, TILE_SEQUENCES):
        index = at + tl.arange(0, TILE_SEQUENCES)
        row = tl.load(query_starts + index, mask=index < sequences, other=0).to(tl.int32)
        begun = (row * GROUP // TILE_ROWS + index <= place) & (index < sequences)
        sequence += tl.sum(begun.to(tl.int32))
    if sequence < 0:
        return
    first_row = tl.load(query_starts + sequence).to(tl.int32)
    count = tl.load(query_starts + sequence + 1).to(tl.int32) - first_row
    tile = place - (first_row * GROUP // TILE_ROWS + sequence)
    if tile * TILE_ROWS >= count * GROUP:
        return
    past = tl.load(lengths + sequence).to(tl.int32) - count

    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, TILE_DIM)
    # Rows past the end see what the last query does, and are not written.
    query = tl.minimum(rows // GROUP, count - 1)
    heads = kv_head * GROUP + rows % GROUP
    own = rows < count * GROUP
    wide_rows = (first_row + query).to(tl.int64)
    query_rows = wide_rows * query_stride + heads * query_head_stride
    q, row_scale = load_query(queries, query_rows, own, CODES != PLAIN, HEAD_DIM, TILE_DIM)
    positions = past + query
    row_slopes = load_learned(slopes, heads, own) if slopes is not None else None
    head_key_scales = key_scales
    head_value_scales = value_scales
    if CODES != PLAIN:
        head_key_scales = key_scales + kv_head * scale_head_stride
        head_value_scales = value_scales + kv_head * scale_head_stride

    first_position = past + tile * TILE_ROWS // GROUP
    end = past + tl.minimum((tile * TILE_ROWS + TILE_ROWS - 1) // GROUP, count - 1) + 1
    # From the pool come tokens [begin, pool_end). Of those all rows of the tile see [whole, full);
    # the others are at the window's edge, or at the diagonal or the chunk's begin. The chunk's own
    # come from the pool too unless they are given.
    pool_end = past if new_keys is not None else end
    full = tl.minimum(pool_end, first_position + 1) // TILE_TOKENS * TILE_TOKENS
    least = tl.zeros_like(past)
    all_see = tl.zeros_like(past)
    if window is not None:
        least = tl.maximum(first_position - window + 1, 0)
        all_see = tl.maximum(end - window, 0)
    begin = least // TILE_TOKENS * TILE_TOKENS
    full = tl.maximum(full, begin)
    whole = tl.minimum(tl.cdiv(all_see, TILE_TOKENS) * TILE_TOKENS, full)

    peak = tl.full([TILE_ROWS], LEAST, tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            part_begin, part_end = begin, whole
        elif part == 1:
            part_begin, part_end = whole, full
        else:
            part_begin, part_end = full, pool_end
        if part > 0 or window is not None:
            peak, total, mixed = attend_pages(
                peak,
                total,
                mixed,
                q,
                row_scale,
                positions,
                score_scale,
                soft_cap,
                row_slopes,
                window,
                part_begin,
                part_end,
                least,
                page_table + tl.cast(sequence, tl.int64) * table_stride,
                keys + kv_head * key_head_stride,
                values + kv_head * value_head_stride,
                head_key_scales,
                head_value_scales,
                key_page_stride,
                key_token_stride,
                value_page_stride,
                value_token_stride,
                scale_page_stride,
                scale_token_stride,
                MASKED=part != 1,
                CAUSAL=True,
                CODES=CODES,
                HEAD_DIM=HEAD_DIM,
                BLOCK_TOKENS=BLOCK_TOKENS,
                TILE_TOKENS=TILE_TOKENS,
                TILE_DIM=TILE_DIM,
                STAGES=STAGES,
            )
    if new_keys is not None:
        new_begin = past + tl.maximum(least - past, 0) // TILE_TOKENS * TILE_TOKENS
        # Behind the chunk are other sequences' rows.
        in_chunk = new_begin + (past + count - new_begin) // TILE_TOKENS * TILE_TOKENS
        new_end = tl.minimum(end, in_chunk)
        for start in tl.range(new_begin, new_end, TILE_TOKENS, num_stages=STAGES):
            row = first_row + start - past
            tokens = start + tl.arange(0, TILE_TOKENS)
            edge = start + TILE_TOKENS > first_position + 1
            if window is not None:
                edge = edge | (start < all_see)
            peak, total, mixed = attend_tile(
                peak,
                total,
                mixed,
                q,
                new_keys.load([row, kv_head * HEAD_DIM]),
                new_values.load([row, kv_head * HEAD_DIM]),
                row_scale,
                None,
                None,
                score_scale,
                soft_cap,
                row_slopes,
                window,
                tokens,
                tokens < end,
                positions,
                edge,
                CAUSAL=True,
            )
        if new_end < end:
            row = first_row + new_end - past
            tokens = new_end + tl.arange(0, TILE_TOKENS)
            live = tokens < past + count
            # A weight of zero does not undo a value that is not finite.
            tile_values = new_values.load([row, kv_head * HEAD_DIM])
            peak, total, mixed = attend_tile(
                peak,
                total,
                mixed,
                q,
                new_keys.load([row, kv_head * HEAD_DIM]),
                tl.where(live[:, None], tile_values, 0.0),
                row_scale,
                None,
                None,
                score_scale,
                soft_cap,
                row_slopes,
                window,
                tokens,
                live,
                positions,
                True,
                CAUSAL=True,
            )

    row_sinks = load_learned(sinks, heads, own) if sinks is not None else None
    result = finish(peak, total, mixed, row_sinks).to(out.dtype.element_ty)
    out_rows = wide_rows * out_stride + heads * out_head_stride
    inside = own[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + out_rows[:, None] + dims[None, :], result, mask=inside)
