"""Causal attention of chunks of several sequences over a paged pool.

The algorithm is FlashAttention-2 (Dao 2023): a program keeps a tile of queries and goes over the
keys it may see with an online softmax; only tiles that touch the diagonal are masked. All query
heads of a KV head share a tile, so that keys and values are read once for them. A chunk's own
keys and values are in the pool before it is attended to, so cached and new tokens are one loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.paged_kv import (
    LOG2_E,
    attend_range,
    check_pool,
    gather,
    load_rows,
    tile_dim,
)


def paged_prefill(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    max_queries: int,
) -> None:
    """Write softmax(q k^T / sqrt(head_dim)) v of every query into `out`.

    queries, out: (rows, heads, head_dim), contiguous in the last dimension
    keys, values: (pages, block_tokens, kv_heads, head_dim), see `paged_kv`
    page_table: (sequences, pages) int32 or int64
    query_starts: (sequences + 1,) int32 or int64; sequence s has rows
        [query_starts[s], query_starts[s + 1]), which are its last tokens. Rows of no sequence are
        left as they are.
    lengths: (sequences,) int32 or int64, tokens in all, those of the queries included
    max_queries: at least the most rows of a sequence

    Raises `ValueError` for shapes and types that do not go together.
    """
    check_pool(queries, keys, values, page_table)
    if out.shape != queries.shape or out.stride(-1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not like queries {tuple(queries.shape)}")
    _, heads, head_dim = queries.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    tiles = _tiles(tile_dim(head_dim), queries.element_size())
    grid = (triton.cdiv(max_queries * group, tiles["TILE_ROWS"]), kv_heads, page_table.shape[0])
    _attend_tile[grid](
        queries,
        keys,
        values,
        page_table,
        query_starts,
        lengths,
        out,
        LOG2_E * head_dim**-0.5,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=keys.shape[1],
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
) -> Tensor:
    """The same in plain torch, a sequence at a time: (rows, heads, head_dim) in fp32."""
    _, heads, head_dim = queries.shape
    out = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    starts = query_starts.tolist()
    for i, length in enumerate(lengths.tolist()):
        rows = slice(starts[i], starts[i + 1])
        k = gather(keys, page_table[i], length, heads)
        v = gather(values, page_table[i], length, heads)
        scores = torch.einsum("qhd,htd->hqt", queries[rows].float(), k) * head_dim**-0.5
        past = length - (starts[i + 1] - starts[i])
        later = torch.ones_like(scores[0], dtype=torch.bool).triu_(past + 1)
        scores.masked_fill_(later, -torch.inf)
        out[rows] = torch.einsum("hqt,htd->qhd", torch.softmax(scores, dim=-1), v)
    return out


def _tiles(dim: int, element_size: int) -> dict[str, int]:
    """Tile and launch sizes that fit a Hopper GPU. In 16 bits the fastest of those tried on an
    H100: eleven for heads of 64 and 128, five for 256.
    """
    if element_size == 4:
        rows = 64 if dim <= 128 else 32
        return {"TILE_ROWS": rows, "TILE_TOKENS": 32, "num_warps": 4, "num_stages": 1}
    if dim <= 64:
        return {"TILE_ROWS": 64, "TILE_TOKENS": 64, "num_warps": 4, "num_stages": 3}
    tokens = 128 if dim <= 128 else 64
    return {"TILE_ROWS": 128, "TILE_TOKENS": tokens, "num_warps": 8, "num_stages": 2}


@triton.jit(do_not_specialize=["table_stride"])
def _attend_tile(
    # pointers
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_table: tl.tensor,
    query_starts: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    # numbers
    score_scale: tl.tensor,
    # strides, in elements
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    table_stride: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    # constants
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> None:
    """A tile of one sequence's queries for one KV head.

    A tile's rows are (query, head of the group) pairs, queries first. Tiles with the most to see
    start first, so that the grid's end is short work.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    first_row = tl.load(query_starts + sequence).to(tl.int64)
    count = (tl.load(query_starts + sequence + 1) - first_row).to(tl.int32)
    if tile * TILE_ROWS >= count * GROUP:
        return
    past = tl.load(lengths + sequence).to(tl.int32) - count

    rows = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, TILE_DIM)
    # Rows past the end see what the last query does, and are not written.
    query = tl.minimum(rows // GROUP, count - 1)
    heads = kv_head * GROUP + rows % GROUP
    live = rows < count * GROUP
    query_rows = (first_row + query) * query_stride + heads * query_head_stride
    q = load_rows(queries, query_rows, live, True, HEAD_DIM, TILE_DIM)

    positions = past + query
    # Tokens [0, all_see) are seen by every row of the tile, [all_see, end) by some.
    all_see = (past + tile * TILE_ROWS // GROUP + 1) // TILE_TOKENS * TILE_TOKENS
    end = past + tl.minimum((tile * TILE_ROWS + TILE_ROWS - 1) // GROUP, count - 1) + 1
    peak = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    mixed = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    for masked in tl.static_range(2):
        peak, total, mixed = attend_range(
            peak,
            total,
            mixed,
            q,
            positions,
            score_scale,
            all_see * masked,
            end if masked else all_see,
            page_table + sequence.to(tl.int64) * table_stride,
            keys + kv_head * key_head_stride,
            values + kv_head * value_head_stride,
            key_page_stride,
            key_token_stride,
            value_page_stride,
            value_token_stride,
            MASKED=masked == 1,
            HEAD_DIM=HEAD_DIM,
            BLOCK_TOKENS=BLOCK_TOKENS,
            TILE_TOKENS=TILE_TOKENS,
            TILE_DIM=TILE_DIM,
        )

    out_rows = (first_row + query) * out_stride + heads * out_head_stride
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    inside = live[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + out_rows[:, None] + dims[None, :], result, mask=inside)
