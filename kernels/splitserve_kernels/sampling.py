"""Draws tokens from rows of logits, without sorting them.

The meaning is that of `splitserve.engine.sampler`: temperature, then top-k, top-p of what that
left, min-p, and the inverse of the cumulative distribution in the order of token ids. One program
draws a row, which stays in the L2 cache:

1. One pass finds the greatest logit and the lowest token that has it; a greedy row ends here.
2. Top-k and top-p each leave the logits above a threshold, and of those equal to it the first few.
   The threshold is searched by halving: passes over the row count, or weigh, what is above a
   middle, until few enough are left between the bounds to be collected; these are searched alone.
3. One pass sums each tile's weights, in fp64; the tile that the uniform falls into is gone over
   once more.

A weight is exp((logit - greatest) / temperature) in fp32, so a uniform within about 1e-6 of a
boundary may fall on its other side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.argmax import check_logits, lowest_of

MAX_VOCAB = 1 << 19

_TILE = 8192
_COLLECTED = 4096
_NO_KEY = tl.constexpr(-0x80000000)
# exp(-104) is zero in fp32.
_LEAST_EXPONENT = tl.constexpr(-104.0)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """(rows,) int64 tokens.

    logits: (rows, vocab), a 16-bit type or fp32, contiguous in the last dimension
    temperatures: (rows,) fp32; 0 takes the greatest logit, the lowest token of equal ones
    top_k: (rows,) int32; 0 keeps all
    top_p: (rows,) fp32 or fp64, in (0, 1]
    min_p: (rows,) fp32, in [0, 1]
    uniforms: (rows,) fp64 or fp32, in [0, 1)

    Raises `ValueError` for a shape or type that is not supported.
    """
    check_logits(logits)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} is above {MAX_VOCAB}")
    for parameters in (temperatures, top_k, top_p, min_p, uniforms):
        if parameters.shape != (rows,) or not parameters.is_contiguous():
            raise ValueError(f"parameters must be ({rows},), got {tuple(parameters.shape)}")
    tile = min(_TILE, max(16, triton.next_power_of_2(vocab)))
    collected = min(_COLLECTED, tile)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    scratch = torch.empty((rows, collected), dtype=torch.int32, device=logits.device)
    _sample[(rows,)](
        logits,
        temperatures,
        top_k,
        top_p,
        min_p,
        uniforms,
        scratch,
        out,
        logits.stride(0),
        VOCAB=vocab,
        TILE=tile,
        TILES=max(2, triton.next_power_of_2(triton.cdiv(vocab, tile))),
        COLLECTED=collected,
        num_warps=16 if tile == _TILE else 4,
    )
    return out


def sample_reference(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """The same in plain torch, a row at a time."""
    out = logits.argmax(dim=-1)
    for i, row in enumerate(logits):
        if temperatures[i] > 0:
            settings = (float(x[i]) for x in (temperatures, top_k, top_p, min_p))
            cumulative = truncated_reference(row, *settings).cumsum(dim=-1)
            target = float(uniforms[i]) * cumulative[-1]
            token = torch.searchsorted(cumulative, target, right=True)
            out[i] = token.clamp_(max=len(row) - 1)
    return out


def truncated_reference(
    row: Tensor, temperature: float, top_k: float, top_p: float, min_p: float
) -> Tensor:
    """One row's probabilities before truncation, fp64, zero for tokens that it takes away."""
    wide = row.double()
    probs = torch.softmax((wide - wide.max()) / temperature, dim=-1)
    kept = min(int(top_k), len(probs)) or len(probs)
    ranked, order = torch.sort(probs, descending=True, stable=True)
    ranked, order = ranked[:kept], order[:kept]
    before = ranked.cumsum(dim=-1) - ranked
    if top_p < 1:
        ranked = torch.where(before < top_p * ranked.sum(), ranked, 0.0)
    probs = torch.zeros_like(probs).scatter_(0, order, ranked)
    return torch.where(probs >= min_p * probs.max(), probs, 0.0)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of probabilities under the raw distribution: each row's token's, (rows,)
    fp32, then the k greatest, (rows, k) fp32, and their tokens, (rows, k) int64.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    top, top_tokens = values.topk(min(k, logits.shape[1]), dim=-1)
    return values.gather(1, tokens[:, None])[:, 0], top, top_tokens


@triton.jit
def _to_key(x: tl.tensor) -> tl.tensor:
    """int32 in the order of fp32 `x`; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key: tl.tensor) -> tl.tensor:
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weigh(x: tl.tensor, peak: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """exp((x - peak) / temperature), zero for what is infinitely below."""
    least = temperature * _LEAST_EXPONENT
    below = tl.maximum(x - peak, least)
    return tl.where(below > least, tl.exp(below / temperature), 0.0)


@triton.jit
def _load_tile(
    row: tl.tensor, start: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Logits in fp32, -inf past the end, and their keys, which are the least past the end."""
    columns = start + tl.arange(0, TILE)
    x = tl.load(row + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    return x, tl.where(columns < VOCAB, _to_key(x), _NO_KEY)


@triton.jit
def _weigh_from(
    row: tl.tensor,
    threshold: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    WEIGHS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How many keys of the row are at least `threshold`, int32, and their weight, fp64 (0 unless
    WEIGHS).
    """
    counts = tl.zeros([TILE], tl.int32)
    weights = tl.zeros([TILE], tl.float32)
    for start in range(0, VOCAB, TILE):
        x, keys = _load_tile(row, start, VOCAB, TILE)
        counts += (keys >= threshold).to(tl.int32)
        if WEIGHS:
            weights += tl.where(keys >= threshold, _weigh(x, peak, temperature), 0.0)
    return tl.sum(counts, 0), tl.sum(weights.to(tl.float64), 0)


@triton.jit
def _search(
    row: tl.tensor,
    scratch: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    wanted_count: tl.tensor,
    wanted_weight: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    WEIGHS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    COLLECTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The greatest key such that what is not below it reaches the wanted count, or weight if
    WEIGHS. Also how many are not below it, how many are above, and the latter's weight.

    Invariant: from `low` on there is enough, `low_count` of them; from `high` on there is not.
    """
    high_count = tl.full((), 0, tl.int32)
    high_weight = tl.full((), 0.0, tl.float64)
    step = tl.full((), 0, tl.int32)
    while (low_count - high_count > COLLECTED) & (low + 1 < high):
        # Halving values is quick where logits lie evenly, halving keys is sure to come to an end.
        middle = (low & high) + ((low ^ high) >> 1)
        value = _to_key(0.5 * _from_key(low) + 0.5 * _from_key(high - 1))
        by_value = (step % 2 == 0) & (value > low) & (value < high)
        middle = tl.where(by_value, value, middle)
        count, weight = _weigh_from(row, middle, peak, temperature, WEIGHS, VOCAB, TILE)
        enough = weight >= wanted_weight if WEIGHS else count >= wanted_count
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
        high_weight = tl.where(enough, high_weight, weight)
        step += 1

    if low + 1 < high:
        # The scratch may still be read by the search before.
        tl.debug_barrier()
        filled = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, TILE):
            _, keys = _load_tile(row, start, VOCAB, TILE)
            between = ((keys >= low) & (keys < high)).to(tl.int32)
            places = filled + tl.cumsum(between, 0) - 1
            tl.store(scratch + places, keys, mask=(between > 0) & (places < COLLECTED))
            filled += tl.sum(between, 0)
        tl.debug_barrier()
        columns = tl.arange(0, COLLECTED)
        keys = tl.load(scratch + columns, mask=columns < filled, other=_NO_KEY)
        weights = tl.zeros([COLLECTED], tl.float64)
        if WEIGHS:
            weights = _weigh(_from_key(keys), peak, temperature).to(tl.float64)
        base_count, base_weight = high_count, high_weight
        while low + 1 < high:
            middle = (low & high) + ((low ^ high) >> 1)
            count = base_count + tl.sum((keys >= middle).to(tl.int32), 0)
            weight = base_weight
            if WEIGHS:
                weight += tl.sum(tl.where(keys >= middle, weights, 0.0), 0)
            enough = weight >= wanted_weight if WEIGHS else count >= wanted_count
            low = tl.where(enough, middle, low)
            low_count = tl.where(enough, count, low_count)
            high = tl.where(enough, high, middle)
            high_count = tl.where(enough, high_count, count)
            high_weight = tl.where(enough, high_weight, weight)
    return low, low_count, high_count, high_weight


@triton.jit
def _last_of_equals(
    row: tl.tensor,
    threshold: tl.tensor,
    wanted: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The token of the `wanted`-th key that equals `threshold`."""
    found = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    for start in range(0, VOCAB, TILE):
        _, keys = _load_tile(row, start, VOCAB, TILE)
        equal = (keys == threshold).to(tl.int32)
        ranks = found + tl.cumsum(equal, 0)
        hits = (equal > 0) & (ranks == wanted)
        last = tl.maximum(last, tl.max(tl.where(hits, start + tl.arange(0, TILE), 0), 0))
        found += tl.sum(equal, 0)
    return last


@triton.jit
def _kept_weights(
    row: tl.tensor,
    start: tl.tensor,
    threshold: tl.tensor,
    last: tl.tensor,
    least_weight: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """A tile's weights in fp64, zero for tokens that truncation takes away."""
    x, keys = _load_tile(row, start, VOCAB, TILE)
    columns = start + tl.arange(0, TILE)
    kept = (keys > threshold) | ((keys == threshold) & (columns <= last))
    weights = tl.where(kept & (columns < VOCAB), _weigh(x, peak, temperature), 0.0)
    return tl.where(weights >= least_weight, weights, 0.0).to(tl.float64)


@triton.jit
def _sample(
    # pointers
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    uniforms: tl.tensor,
    scratch: tl.tensor,
    out: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    COLLECTED: tl.constexpr,
) -> None:
    """One row."""
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    scratch += number * COLLECTED
    columns = tl.arange(0, TILE)

    peaks = tl.full([TILE], float("-inf"), tl.float32)
    lows = tl.full([TILE], float("inf"), tl.float32)
    tokens = tl.zeros([TILE], tl.int32)
    for start in range(0, VOCAB, TILE):
        x, _ = _load_tile(row, start, VOCAB, TILE)
        tokens = tl.where(x > peaks, start + columns, tokens)
        peaks = tl.maximum(x, peaks)
        lows = tl.minimum(lows, tl.where(start + columns < VOCAB, x, float("inf")))
    peak = tl.max(peaks, 0)
    greedy = lowest_of(peaks == peak, tokens)

    temperature = tl.load(temperatures + number)
    if temperature == 0:
        tl.store(out + number, greedy.to(tl.int64))
        return

    threshold = _to_key(tl.min(lows, 0))
    end = _to_key(peak) + 1
    from_threshold = tl.full((), VOCAB, tl.int32)
    # Of the keys that equal the threshold, the first `equals` are kept.
    equals = tl.full((), VOCAB, tl.int32)
    last = tl.full((), VOCAB, tl.int32)
    above = tl.full((), 0, tl.int32)

    k = tl.load(top_k + number).to(tl.int32)
    p = tl.load(top_p + number).to(tl.float64)
    if (k > 0) & (k < VOCAB):
        threshold, from_threshold, above, _ = _search(
            row, scratch, threshold, from_threshold, end, k, 0.0, peak, temperature,
            False, VOCAB, TILE, COLLECTED,
        )  # fmt: skip
        equals = k - above
    if p < 1.0:
        above, above_weight = _weigh_from(row, threshold + 1, peak, temperature, True, VOCAB, TILE)
        equals = tl.minimum(equals, from_threshold - above)
        of_equal = _weigh(_from_key(threshold), peak, temperature).to(tl.float64)
        wanted = p * (above_weight + equals.to(tl.float64) * of_equal)
        found, from_found, above, above_weight = _search(
            row, scratch, threshold, from_threshold, end, 0, wanted, peak, temperature,
            True, VOCAB, TILE, COLLECTED,
        )  # fmt: skip
        of_equal = tl.maximum(_weigh(_from_key(found), peak, temperature), 1e-37).to(tl.float64)
        most = tl.where(found == threshold, equals, from_found - above)
        short = tl.minimum((wanted - above_weight) / of_equal, most.to(tl.float64))
        equals = tl.maximum(tl.ceil(short).to(tl.int32), 1)
        threshold, from_threshold = found, from_found
    if equals < from_threshold - above:
        last = _last_of_equals(row, threshold, equals, VOCAB, TILE)

    least_weight = tl.load(min_p + number).to(tl.float32)
    tile_numbers = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float64)
    for start in range(0, VOCAB, TILE):
        weights = _kept_weights(
            row, start, threshold, last, least_weight, peak, temperature, VOCAB, TILE
        )
        sums = tl.where(tile_numbers == start // TILE, tl.sum(weights, 0), sums)
    target = tl.load(uniforms + number).to(tl.float64) * tl.sum(sums, 0)
    reached = (tl.cumsum(sums, 0) > target) & (sums > 0)
    # Rounding may keep the last sum from being reached.
    tile = tl.min(tl.where(reached, tile_numbers, TILES), 0)
    tile = tl.where(tile < TILES, tile, tl.max(tl.where(sums > 0, tile_numbers, 0), 0))
    before = tl.sum(tl.where(tile_numbers < tile, sums, 0.0), 0)
    start = tile * TILE
    weights = _kept_weights(
        row, start, threshold, last, least_weight, peak, temperature, VOCAB, TILE
    )
    hits = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
    token = lowest_of(hits, start + columns)
    likely = tl.max(tl.where(weights > 0, start + columns, greedy), 0)
    token = tl.where(token < VOCAB, token, likely)
    tl.store(out + number, token.to(tl.int64))
