"""From products of queries and keys to mixed values: the rules of attention and the online softmax.

The softmax is that of FlashAttention-2 (Dao 2023), in base 2: a row's state is its highest score so
far, its sum of weights and its weighted sum of values, the latter two relative to the former.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.paged_kv import load_rows

LOG2_E = 1.4426950408889634

# Below every score: a row that has seen nothing yet. Finite, so that no difference is NaN.
LEAST = tl.constexpr(-1.0e30)
# A smaller scale of values counts as this.
LEAST_SCALE = tl.constexpr(2.0**-60)


class ScoreNumbers(NamedTuple):
    """The rules' numbers as the kernels take them."""

    score_scale: float
    soft_cap: float | None


def score_numbers(
    heads: int,
    head_dim: int,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> ScoreNumbers:
    """Check the rules, and put them in base 2. With a cap scores are scaled to exponents of
    tanh(x) = (e^2x - 1) / (e^2x + 1). Raises `ValueError`.
    """
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"scale is {scale}, must be above 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, must be at least 1")
    for name, tensor in (("slopes", slopes), ("sinks", sinks)):
        if tensor is not None and (tensor.shape != (heads,) or tensor.dtype != torch.float32):
            raise ValueError(f"{name} must be ({heads},) float32, is {tensor.shape} {tensor.dtype}")
    if soft_cap is None:
        return ScoreNumbers(scale * LOG2_E, None)
    if soft_cap <= 0:
        raise ValueError(f"soft_cap is {soft_cap}, must be above 0")
    return ScoreNumbers(2 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E)


@triton.jit
def load_query(
    queries: tl.tensor,
    places: tl.tensor,
    live: tl.tensor,
    CODED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(rows, TILE_DIM), and what each row is to be multiplied by.

    Against codes 16-bit queries are fp16, which holds every code. Bf16's larger range is kept by
    a power of two a row.
    """
    q = load_rows(queries, places, live, True, HEAD_DIM, TILE_DIM)
    row_scale = tl.full([q.shape[0]], 1.0, tl.float32)
    if CODED and q.dtype != tl.float32:
        wide = q.to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(wide), 1), 1e-30)
        row_scale = tl.exp2(tl.floor(tl.log2(most)))
        q = (wide / row_scale[:, None]).to(tl.float16)
    return q, row_scale


@triton.jit
def load_learned(values: tl.tensor, heads: tl.tensor, live: tl.tensor) -> tl.tensor:
    """Slopes or sinks of rows, in base 2."""
    return tl.load(values + heads, mask=live, other=0.0) * 1.4426950408889634


@triton.jit
def attend_tile(
    # state
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    # inputs
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    # rules
    row_scale: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    slopes: tl.tensor,
    window: tl.tensor,
    # positions
    tokens: tl.tensor,
    live: tl.tensor,
    positions: tl.tensor,
    edge: tl.tensor,
    # constants
    CAUSAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile of keys and values to the state. A rule that is None does not exist.

    `tokens` are the keys' positions, `positions` the queries'. If the tile is at an `edge`, rows
    see what is `live`, if CAUSAL of that only what is theirs to see.
    Values' scales are part of the weights' exponents: weights stay at most 1, and so exact in 16
    bits, and their sum takes the scales out again.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    factor = score_scale
    if key_scale is not None:
        scores = scores * (row_scale * score_scale)[:, None] * key_scale[None, :]
        factor = 1.0
    elif soft_cap is not None or slopes is not None:
        scores = scores * score_scale
        factor = 1.0
    if soft_cap is not None:
        # Above 2^64 the fraction is 1.
        power = tl.exp2(tl.minimum(scores, 64.0))
        scores = soft_cap * ((power - 1.0) / (power + 1.0))
    if slopes is not None:
        scores += slopes[:, None] * (tokens[None, :] - positions[:, None]).to(tl.float32)
    if value_scale is not None:
        value_scale = tl.maximum(value_scale, LEAST_SCALE)
        scores += tl.log2(value_scale)[None, :]
    if edge:
        seen = live[None, :]
        if CAUSAL:
            seen = seen & (tokens[None, :] <= positions[:, None])
            if window is not None:
                seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    shrink = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * factor - new_peak[:, None])
    if value_scale is not None:
        total = total * shrink + tl.sum(weights * (1.0 / value_scale)[None, :], 1)
    else:
        total = total * shrink + tl.sum(weights, 1)
    mixed = mixed * shrink[:, None]
    mixed = tl.dot(weights.to(v.dtype), v, acc=mixed, input_precision="tf32x3")
    return new_peak, total, mixed


@triton.jit
def finish(peak: tl.tensor, total: tl.tensor, mixed: tl.tensor, sinks: tl.tensor) -> tl.tensor:
    """The result of a state, with rows' sinks or None. Zeros where nothing was seen."""
    if sinks is not None:
        new_peak = tl.maximum(peak, sinks)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.exp2(sinks - new_peak)
        mixed = mixed * shrink[:, None]
    return mixed / tl.where(total > 0, total, 1.0)[:, None]


def reference_rows(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distance: Tensor,
    *,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """All the rules in plain torch: (rows, heads, head_dim) in fp32.

    queries: (rows, heads, head_dim); keys, values: (heads, tokens, head_dim) in fp32
    distance: (rows, tokens), the key's position less the query's
    """
    heads, head_dim = queries.shape[1:]
    scores = torch.einsum("qhd,htd->hqt", queries.float(), keys)
    scores *= head_dim**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if slopes is not None:
        scores = scores + slopes.view(heads, 1, 1) * distance
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sinks = sinks.view(heads, 1, 1).expand(heads, scores.shape[1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]]
    return torch.einsum("hqt,htd->qhd", weights, values)
