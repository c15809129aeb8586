"""Attention over the paged pool in plain torch.

`BatchedAttention` is the fast one for CPUs. `RowwiseAttention` computes every query row by itself
over exactly the tokens it may see, so that its bits depend on neither the batch nor the chunk:
the row at position p is always the same product of the same shapes. It is what deterministic
mode rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.engine.batch import QueryGroup, StepBatch
from splitserve.engine.page_memory import PageMemory
from splitserve.models.layers.self_attention import AttentionRules

TILE_QUERIES = 128


class Attention(Protocol):
    """Causal attention of a step's new tokens over their sequences' pages."""

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """Shape of `queries` and of the result: (rows, heads, head_dim)."""
        ...


class BatchedAttention:
    """One call for all decoding sequences, one for each chunk of a prompt."""

    def __init__(self, memory: PageMemory, rules: Sequence[AttentionRules]) -> None:
        """`rules` has each layer's."""
        self._memory = memory
        self._rules = rules

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention`."""
        out = torch.empty_like(queries)
        rules = self._rules[layer]
        for group in batch.groups:
            rows = slice(group.first_row, group.first_row + group.sequences * group.count)
            first = self._first_page(group, rules)
            origin = first * self._memory.block_tokens
            keys, values = self._memory.gather(layer, group.page_table[:, first:])
            seen = group.longest - origin
            keys, values = keys[:, :, :seen], values[:, :, :seen]
            attend = _decode if group.count == 1 else _chunk
            out[rows] = attend(queries[rows], keys, values, group, origin, rules)
        return out

    def _first_page(self, group: QueryGroup, rules: AttentionRules) -> int:
        """The first page that any of the queries sees."""
        if rules.window is None:
            return 0
        first_seen = group.shortest - group.count - rules.window + 1
        return max(0, first_seen) // self._memory.block_tokens


class RowwiseAttention:
    """One call for every query row."""

    def __init__(self, memory: PageMemory, rules: Sequence[AttentionRules]) -> None:
        """`rules` has each layer's."""
        self._memory = memory
        self._rules = rules

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention`."""
        out = torch.empty_like(queries)
        rules = self._rules[layer]
        for group in batch.groups:
            lengths = group.lengths.tolist()
            for index, length in enumerate(lengths):
                table = group.page_table[index : index + 1]
                keys, values = self._memory.gather(layer, table)
                for offset in range(group.count):
                    row = group.first_row + index * group.count + offset
                    seen = length - group.count + offset + 1
                    first = 0 if rules.window is None else max(0, seen - rules.window)
                    k, v = keys[0, :, first:seen], values[0, :, first:seen]
                    out[row] = _row(queries[row], k, v, rules)
        return out


def _row(query: Tensor, keys: Tensor, values: Tensor, rules: AttentionRules) -> Tensor:
    """One row (heads, head_dim) over the (kv_heads, seen, head_dim) that it sees, the last its
    own, in fp32, in fresh memory.
    """
    kv_heads, seen, _ = keys.shape
    q = query.float().view(kv_heads, -1, query.shape[-1])
    k, v = keys.float().contiguous(), values.float().contiguous()
    scores = torch.bmm(q, k.transpose(1, 2)) * rules.scale
    distance = torch.arange(1 - seen, 1, device=query.device)[None]
    weights = _weigh(scores[None], distance, rules)[0]
    return torch.bmm(weights, v).view_as(query).to(query.dtype)


def _decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    group: QueryGroup,
    origin: int,
    rules: AttentionRules,
) -> Tensor:
    """One query a sequence. The query heads of a KV head stand in for its query positions."""
    count, heads, size = queries.shape
    q = queries.view(count, keys.shape[1], heads // keys.shape[1], size)
    if rules.plain:
        mask = None
        if count > 1:
            place = torch.arange(group.longest, device=queries.device)
            mask = (place < group.lengths[:, None])[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=rules.scale
        )
        return mixed.reshape(count, heads, size)
    scores = torch.matmul(q, keys.transpose(-1, -2)).float() * rules.scale
    place = torch.arange(origin, group.longest, device=queries.device)
    weights = _weigh(scores, place - (group.lengths[:, None] - 1), rules)
    return torch.matmul(weights.to(values.dtype), values).reshape(count, heads, size)


def _chunk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    group: QueryGroup,
    origin: int,
    rules: AttentionRules,
) -> Tensor:
    """All new tokens of one sequence, each seeing what is before it. Keys are those of positions
    from `origin` on.

    Tile by tile, so that scores above the diagonal are mostly never computed. Products are in the
    model's type, the softmax in fp32. For 512 tokens in bf16 this is twice as fast as SDPA's
    kernel for CPUs (2.2 against 4.6 ms a layer with 9 heads of 64 on two cores).
    """
    count, heads, size = queries.shape
    kv_heads, start = keys.shape[1], group.longest - group.count - origin
    # (kv_heads, rows, heads of a KV head, head_dim): rows of a tile are one product's rows.
    q = queries.view(count, kv_heads, -1, size).transpose(0, 1)
    k, v = keys[0].transpose(1, 2).contiguous(), values[0].contiguous()
    out = queries.new_empty(kv_heads, count, heads // kv_heads, size)
    for first in range(0, count, TILE_QUERIES):
        end = min(first + TILE_QUERIES, count)
        since = 0 if rules.window is None else max(0, start + first - rules.window + 1)
        seen = slice(since, start + end)
        rows = q[:, first:end].reshape(kv_heads, -1, size)
        scores = torch.bmm(rows, k[:, :, seen]).float().mul_(rules.scale)
        scores = scores.view(kv_heads, end - first, -1, start + end - since)
        if rules.plain:
            _hide_later(scores[..., start + first :])
            weights = torch.softmax(scores, dim=-1)
        else:
            place = torch.arange(since, start + end, device=queries.device)
            distance = place - place[-(end - first) :, None]
            weights = _weigh(scores.transpose(0, 1), distance, rules).transpose(0, 1)
        weights = weights.to(v.dtype).reshape(kv_heads, -1, start + end - since)
        mixed = torch.bmm(weights, v[:, seen])
        out[:, first:end] = mixed.view(kv_heads, end - first, -1, size)
    return out.transpose(0, 1).reshape(count, heads, size)


def _hide_later(scores: Tensor) -> None:
    """Mask what is above the diagonal of (kv_heads, rows, heads, rows), in place."""
    rows = scores.shape[1]
    later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu_(1)
    scores.masked_fill_(later[None, :, None, :], -torch.inf)


def _weigh(scores: Tensor, distance: Tensor, rules: AttentionRules) -> Tensor:
    """Softmax of scaled (rows, kv_heads, heads of a KV head, seen) scores by all the rules.

    `distance` is (rows, seen): the key's position less the query's.
    """
    rows, kv_heads, heads, seen = scores.shape
    if rules.soft_cap is not None:
        scores = rules.soft_cap * torch.tanh(scores / rules.soft_cap)
    if rules.slopes is not None:
        scores = scores + rules.slopes.view(kv_heads, heads, 1) * distance[:, None, None]
    hidden = distance > 0
    if rules.window is not None:
        hidden = hidden | (distance <= -rules.window)
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    if rules.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = rules.sinks.view(kv_heads, heads, 1).expand(rows, kv_heads, heads, 1)
    return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :seen]
