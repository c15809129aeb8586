"""What both attention kernels share: addressing of the paged pool, the online softmax, tolerances.

A pool's keys and values are tensors of shape (pages, block_tokens, kv_heads, head_dim), usually
strided views of something larger; only the last dimension must be contiguous. A page table of
shape (sequences, pages), int32 or int64, names each sequence's pages in order. Entries past a
sequence's length are never read.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

TOLERANCE = MappingProxyType(
    {
        torch.bfloat16: 4 * 2**-9,
        torch.float16: 4 * 2**-11,
        torch.float32: 2**-17,
    }
)
"""How far a head's result may be from the exact one, relative in the Euclidean norm.

In the 16-bit types the weights are rounded once before they meet the values, and the result is
rounded once: two times half a unit in the last place, and as much again for the worst row. In fp32
a product is three tf32 products, exact to about 2^-21, and what is left is the order of sums.
"""

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634


@triton.jit
def attend_range(
    # state
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    # queries
    q: tl.tensor,
    positions: tl.tensor,
    score_scale: tl.tensor,
    # tokens
    first: tl.tensor,
    end: tl.tensor,
    # pointers
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    # strides, in elements
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    # constants
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Go over tokens [first, end) of one sequence with the online softmax, in base 2.

    `q` is (rows, TILE_DIM), `positions` (rows,): the last token that each row may see. `table`
    points at the sequence's row of the page table, `keys` and `values` at the head in page 0. The
    state is each row's highest score so far, its sum of weights and its weighted sum of values,
    the latter two relative to the former. Every row must see a token of the first tile. Without
    MASKED every row sees all tokens, and their number is a multiple of TILE_TOKENS.
    """
    for start in range(first, end, TILE_TOKENS):
        tokens = start + tl.arange(0, TILE_TOKENS)
        live = tokens < end
        pages = tl.load(table + tokens // BLOCK_TOKENS, mask=live, other=0)
        # A pool may hold more elements than 32 bits can count.
        pages = pages.to(tl.int64)
        slots = tokens % BLOCK_TOKENS
        key_rows = pages * key_page_stride + slots * key_token_stride
        value_rows = pages * value_page_stride + slots * value_token_stride

        k = load_rows(keys, key_rows, live, MASKED, HEAD_DIM, TILE_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * score_scale
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(values, value_rows, live, MASKED, HEAD_DIM, TILE_DIM)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, acc=mixed, input_precision="tf32x3")
        peak = new_peak
    return peak, total, mixed


@triton.jit
def load_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    live: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> tl.tensor:
    """(rows, TILE_DIM) at the given offsets, zero from HEAD_DIM on and, if MASKED, where not
    `live`.
    """
    dims = tl.arange(0, TILE_DIM)
    places = pointer + rows[:, None] + dims[None, :]
    if MASKED:
        tile = tl.load(places, mask=live[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < TILE_DIM:
        tile = tl.load(places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(places)
    return tile


def tile_dim(head_dim: int) -> int:
    """The head size padded to what `tl.dot` takes: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def check_pool(queries: Tensor, keys: Tensor, values: Tensor, page_table: Tensor) -> None:
    """Raise `ValueError` where shapes or types do not go together."""
    _, heads, head_dim = queries.shape
    if keys.shape != values.shape or keys.shape[3] != head_dim or heads % keys.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not go together"
        )
    if not queries.dtype == keys.dtype == values.dtype or queries.dtype not in TOLERANCE:
        raise ValueError(f"types {queries.dtype}, {keys.dtype}, {values.dtype} are not supported")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    if any(tensor.stride(-1) != 1 for tensor in (queries, keys, values, page_table)):
        raise ValueError("the last dimension of queries, pool and page table must be contiguous")


def gather(pool: Tensor, pages: Tensor, length: int, heads: int) -> Tensor:
    """One sequence as the references read it: (heads, length, head_dim) in fp32, heads repeated."""
    blocks = pool[pages[: -(-length // pool.shape[1])].long()]
    rows = blocks.flatten(0, 1)[:length].float()
    return rows.transpose(0, 1).repeat_interleave(heads // pool.shape[2], dim=0)
