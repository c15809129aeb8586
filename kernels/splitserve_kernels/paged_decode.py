"""Attention of one query a sequence over a paged pool, split over the sequence.

The algorithm is Flash-Decoding (Dao, Haziza, Massa, Sizov 2023): splits of a long sequence are
attended to by programs of their own, with the online softmax of FlashAttention-2 (Dao 2023), and
a second kernel weights their results by their sums. All query heads of a KV head share a tile, so
that keys and values are read once. The launch grid depends on shapes alone, never on lengths, so
that it can be captured in a CUDA graph.
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

MAX_SPLITS = 64
_LEAST_SPLIT_TOKENS = 256
_PROGRAMS_PER_PROCESSOR = 4


def paged_decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    num_splits: int,
) -> None:
    """Write softmax(q k^T / sqrt(head_dim)) v of each sequence's one query into `out`.

    queries, out: (sequences, heads, head_dim), contiguous in the last dimension
    keys, values: (pages, block_tokens, kv_heads, head_dim), see `paged_kv`
    page_table: (sequences, pages) int32 or int64
    lengths: (sequences,) int32 or int64, tokens to attend to; 0 gives zeros
    num_splits: 1 to MAX_SPLITS, see `choose_splits`

    Raises `ValueError` for shapes and types that do not go together.
    """
    check_pool(queries, keys, values, page_table)
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}, must be 1 to {MAX_SPLITS}")
    if out.shape != queries.shape or out.stride(-1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not like queries {tuple(queries.shape)}")
    sequences, heads, head_dim = queries.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    # One split's result is the whole result: it goes where the reduction would put it.
    partial = out.unsqueeze(2)
    if num_splits > 1:
        shape = (sequences, heads, num_splits, head_dim)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    log_sums = torch.empty((sequences, heads, num_splits), dtype=torch.float32, device=out.device)
    _attend_split[(kv_heads, num_splits, sequences)](
        queries,
        keys,
        values,
        page_table,
        lengths,
        partial,
        log_sums,
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
        partial.stride(0),
        partial.stride(1),
        partial.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=keys.shape[1],
        TILE_ROWS=max(16, triton.next_power_of_2(group)),
        TILE_DIM=tile_dim(head_dim),
        **_tiles(tile_dim(head_dim), queries.element_size()),
    )
    if num_splits > 1:
        _reduce_splits[(heads, sequences)](
            partial,
            log_sums,
            out,
            out.stride(0),
            out.stride(1),
            num_splits,
            HEAD_DIM=head_dim,
            TILE_SPLITS=MAX_SPLITS,
            TILE_DIM=tile_dim(head_dim),
            num_warps=4,
        )


def choose_splits(sequences: int, kv_heads: int, max_tokens: int, num_processors: int) -> int:
    """How many splits keep `num_processors` busy, none of them tiny in the longest sequence.

    `max_tokens` is what the page table has room for, so that the choice does not follow lengths.
    """
    to_fill = _PROGRAMS_PER_PROCESSOR * num_processors // max(1, sequences * kv_heads)
    return max(1, min(to_fill, max_tokens // _LEAST_SPLIT_TOKENS, MAX_SPLITS))


def paged_decode_reference(
    queries: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, lengths: Tensor
) -> Tensor:
    """The same in plain torch, a sequence at a time: (sequences, heads, head_dim) in fp32."""
    sequences, heads, head_dim = queries.shape
    out = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for i in range(sequences):
        length = int(lengths[i])
        k = gather(keys, page_table[i], length, heads)
        v = gather(values, page_table[i], length, heads)
        scores = torch.einsum("hd,htd->ht", queries[i].float(), k) * head_dim**-0.5
        out[i] = torch.einsum("ht,htd->hd", torch.softmax(scores, dim=-1), v)
    return out


def _tiles(dim: int, element_size: int) -> dict[str, int]:
    """Tiles of keys of 16 KiB, two in flight. For heads of 64 and 128 in 16 bits
    within 2% of the fastest of ten on an H100.
    """
    tokens = min(128, max(16, 16384 // (dim * element_size)))
    return {"TILE_TOKENS": tokens, "num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["table_stride"])
def _attend_split(
    # pointers
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    partial: tl.tensor,
    log_sums: tl.tensor,
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
    partial_stride: tl.tensor,
    partial_head_stride: tl.tensor,
    partial_split_stride: tl.tensor,
    # constants
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> None:
    """One split of one sequence for the query heads of one KV head.

    Writes the split's normalised result and the base-2 logarithm of its sum of weights. A split
    with no tokens writes zeros and -inf.
    """
    kv_head, split = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    num_splits = tl.num_programs(1)
    length = tl.load(lengths + sequence).to(tl.int32)
    split_tokens = tl.cdiv(tl.cdiv(length, num_splits), TILE_TOKENS) * TILE_TOKENS
    first = split * split_tokens
    end = tl.minimum(first + split_tokens, length)

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, TILE_DIM)
    heads = kv_head * GROUP + rows
    query_rows = sequence * query_stride + heads * query_head_stride
    q = load_rows(queries, query_rows, rows < GROUP, True, HEAD_DIM, TILE_DIM)

    peak, total, mixed = attend_range(
        tl.full([TILE_ROWS], float("-inf"), tl.float32),
        tl.zeros([TILE_ROWS], tl.float32),
        tl.zeros([TILE_ROWS, TILE_DIM], tl.float32),
        q,
        tl.zeros([TILE_ROWS], tl.int32) + (end - 1),
        score_scale,
        first,
        end,
        page_table + sequence * table_stride,
        keys + kv_head * key_head_stride,
        values + kv_head * value_head_stride,
        key_page_stride,
        key_token_stride,
        value_page_stride,
        value_token_stride,
        MASKED=True,
        HEAD_DIM=HEAD_DIM,
        BLOCK_TOKENS=BLOCK_TOKENS,
        TILE_TOKENS=TILE_TOKENS,
        TILE_DIM=TILE_DIM,
    )

    empty = first >= end
    divisor = tl.where(empty, 1.0, total)
    log_sum = tl.where(empty, float("-inf"), peak + tl.log2(divisor))
    places = sequence * partial_stride + split * partial_split_stride
    places += heads[:, None] * partial_head_stride + dims[None, :]
    result = (mixed / divisor[:, None]).to(partial.dtype.element_ty)
    inside = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(partial + places, result, mask=inside)
    all_heads = tl.num_programs(0) * GROUP
    sums = log_sums + (sequence * all_heads + heads) * num_splits + split
    tl.store(sums, log_sum, mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _reduce_splits(
    # pointers
    partial: tl.tensor,
    log_sums: tl.tensor,
    out: tl.tensor,
    # strides, in elements
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    # sizes
    num_splits: tl.tensor,
    # constants
    HEAD_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> None:
    """Add one head's splits, each weighted by its share of the sum of weights."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    splits = tl.arange(0, TILE_SPLITS)
    dims = tl.arange(0, TILE_DIM)
    first = (sequence * tl.num_programs(0) + head) * num_splits

    log_sum = tl.load(log_sums + first + splits, mask=splits < num_splits, other=float("-inf"))
    peak = tl.max(log_sum, 0)
    # Only a sequence of no tokens has a peak of -inf; its weights and its result are zero.
    weights = tl.exp2(log_sum - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.maximum(tl.sum(weights, 0), 1e-30)

    mask = (log_sum > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    places = (first + splits)[:, None] * HEAD_DIM + dims[None, :]
    parts = tl.load(partial + places, mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / total
    places = sequence * out_stride + head * out_head_stride + dims
    tl.store(out + places, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
