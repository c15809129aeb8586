"""Attention over the paged pool in plain torch.

`BatchedAttention` is the fast one for CPUs. `RowwiseAttention` computes every query row by itself
over exactly the tokens it may see, so that its bits depend on neither the batch nor the chunk:
the row at position p is always the same product of the same shapes. It is what deterministic
mode rests on.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.engine.batch import QueryGroup, StepBatch
from splitserve.engine.page_memory import PageMemory

TILE_QUERIES = 128


class Attention(Protocol):
    """Causal attention of a step's new tokens over their sequences' pages."""

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """Shape of `queries` and of the result: (rows, heads, head_dim)."""
        ...


class BatchedAttention:
    """One call for all decoding sequences, one for each chunk of a prompt."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention`."""
        out = torch.empty_like(queries)
        for group in batch.groups:
            rows = slice(group.first_row, group.first_row + group.sequences * group.count)
            keys, values = self._memory.gather(layer, group.page_table)
            keys, values = keys[:, :, : group.longest], values[:, :, : group.longest]
            attend = _decode if group.count == 1 else _chunk
            out[rows] = attend(queries[rows], keys, values, group)
        return out


class RowwiseAttention:
    """One call for every query row."""

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention`."""
        out = torch.empty_like(queries)
        for group in batch.groups:
            lengths = group.lengths.tolist()
            for index, length in enumerate(lengths):
                table = group.page_table[index : index + 1]
                keys, values = self._memory.gather(layer, table)
                for offset in range(group.count):
                    row = group.first_row + index * group.count + offset
                    seen = length - group.count + offset + 1
                    out[row] = _row(queries[row], keys[:, :, :seen], values[:, :, :seen])
        return out


def _row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One row (heads, head_dim) over (1, kv_heads, seen, head_dim), in fp32, in fresh memory."""
    kv_heads = keys.shape[1]
    q = query.float().view(kv_heads, -1, query.shape[-1])
    k, v = keys[0].float().contiguous(), values[0].float().contiguous()
    scores = torch.bmm(q, k.transpose(1, 2)) * query.shape[-1] ** -0.5
    mixed = torch.bmm(torch.softmax(scores, dim=-1), v)
    return mixed.view_as(query).to(query.dtype)


def _decode(queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
    """One query a sequence. The query heads of a KV head stand in for its query positions."""
    count, heads, size = queries.shape
    q = queries.view(count, keys.shape[1], heads // keys.shape[1], size)
    mask = None
    if count > 1:
        place = torch.arange(group.longest, device=queries.device)
        mask = (place < group.lengths[:, None])[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return mixed.reshape(count, heads, size)


def _chunk(queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
    """All new tokens of one sequence, each seeing what is before it.

    Tile by tile, so that scores above the diagonal are mostly never computed. Products are in the
    model's type, the softmax in fp32. For 512 tokens in bf16 this is twice as fast as SDPA's
    kernel for CPUs (2.2 against 4.6 ms a layer with 9 heads of 64 on two cores).
    """
    count, heads, size = queries.shape
    kv_heads, start = keys.shape[1], group.longest - group.count
    # (kv_heads, rows, heads of a KV head, head_dim): rows of a tile are one product's rows.
    q = queries.view(count, kv_heads, -1, size).transpose(0, 1)
    k, v = keys[0].transpose(1, 2).contiguous(), values[0].contiguous()
    out = queries.new_empty(kv_heads, count, heads // kv_heads, size)
    for first in range(0, count, TILE_QUERIES):
        end = min(first + TILE_QUERIES, count)
        seen = start + end
        rows = q[:, first:end].reshape(kv_heads, -1, size)
        scores = torch.bmm(rows, k[:, :, :seen]).float().mul_(size**-0.5)
        scores = scores.view(kv_heads, end - first, -1, seen)
        _hide_later(scores[..., start + first :])
        weights = torch.softmax(scores, dim=-1).to(v.dtype).view(kv_heads, -1, seen)
        out[:, first:end] = torch.bmm(weights, v[:, :seen]).view(kv_heads, end - first, -1, size)
    return out.transpose(0, 1).reshape(count, heads, size)


def _hide_later(scores: Tensor) -> None:
    """Mask what is above the diagonal of (kv_heads, rows, heads, rows), in place."""
    rows = scores.shape[1]
    later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores.masked_fill_(later[None, :, None, :], -torch.inf)
