"""What both attention kernels share: addressing of the paged pool, checks, tolerances.

A pool's keys and values are tensors of shape (pages, block_tokens, kv_heads, head_dim), usually
strided views of something larger; only the last dimension must be contiguous. They are of the
queries' type, or codes of 8 bits with a scale for each head of each token, (pages, block_tokens,
kv_heads, 1). A page table of shape (sequences, pages), int32 or int64, names each sequence's pages
in order. Entries past a sequence's length or before its window are never read.
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
a product is three tf32 products, exact to about 2^-21, and what is left is the order of sums. Codes
of 8 bits are exact in fp16 and fp32, so the type of the queries decides there too.
"""

CODE_TYPES = (torch.float8_e4m3fn, torch.int8)
MAX_HEAD_DIM = 256


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


def check_pool(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    out: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Raise `ValueError` where shapes or types do not go together."""
    _, heads, head_dim = queries.shape
    if keys.shape != values.shape or keys.shape[3] != head_dim or heads % keys.shape[2]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not go together"
        )
    is_coded = keys.dtype in CODE_TYPES
    if keys.dtype != values.dtype or queries.dtype not in TOLERANCE:
        raise ValueError(f"types {queries.dtype}, {keys.dtype}, {values.dtype} are not supported")
    if not is_coded and keys.dtype != queries.dtype:
        raise ValueError(f"keys are {keys.dtype}, queries {queries.dtype}")
    for scales in (key_scales, value_scales):
        if is_coded != (scales is not None):
            raise ValueError(f"scales come with codes of 8 bits and only then, not {keys.dtype}")
        if scales is not None and scales.shape != (*keys.shape[:3], 1):
            raise ValueError(f"scales {tuple(scales.shape)} are not one for each head and token")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim} is above {MAX_HEAD_DIM}")
    if any(tensor.stride(-1) != 1 for tensor in (queries, keys, values, page_table)):
        raise ValueError("the last dimension of queries, pool and page table must be contiguous")
    if out.shape != queries.shape or out.stride(-1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not like queries {tuple(queries.shape)}")


def scale_strides(scales: Tensor | None) -> tuple[int, int, int]:
    """A scales tensor's strides of page, token and head, in elements."""
    if scales is None:
        return 0, 0, 0
    return scales.stride(0), scales.stride(1), scales.stride(2)


def gather(
    pool: Tensor, scales: Tensor | None, pages: Tensor, first: int, end: int, heads: int
) -> Tensor:
    """Tokens [first, end) of a sequence as the references read them: (heads, tokens, head_dim) in
    fp32, a KV head repeated for its query heads. Reads no page that holds none of them.
    """
    block = pool.shape[1]
    start = first // block
    own = pages[start : -(-end // block)].long()
    rows = pool[own].flatten(0, 1).float()
    if scales is not None:
        rows = rows * scales[own].flatten(0, 1).float()
    rows = rows[first - start * block : end - start * block]
    return rows.transpose(0, 1).repeat_interleave(heads // pool.shape[2], dim=0)
