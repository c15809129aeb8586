"""Truncation of a row by one program: for rows whose threshold `sampling` could not bring close.

Passes over the row count, or weigh, what is above a middle, until few enough are left between the
bounds to be collected; these are searched alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve_kernels.sampling_keys import NO_KEY, from_key, load_logits, to_key, weigh
from splitserve_kernels.sampling_list import equals_within, halve


@triton.jit
def _load_tile(
    row: tl.tensor, start: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Logits and their keys, which are the least past the end."""
    columns = start + tl.arange(0, TILE)
    x = load_logits(row, columns, VOCAB)
    return x, tl.where(columns < VOCAB, to_key(x), NO_KEY)


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
            weights += tl.where(keys >= threshold, weigh(x, peak, temperature), 0.0)
    return tl.sum(counts, 0), tl.sum(weights.to(tl.float64), 0)


@triton.jit
def _search(
    row: tl.tensor,
    scratch: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    high_count: tl.tensor,
    high_weight: tl.tensor,
    wanted_count: tl.tensor,
    wanted_weight: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    WEIGHS: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The greatest key such that what is not below it reaches the wanted count, or weight if
    WEIGHS. Also how many are not below it, how many are above, and the latter's weight.

    Invariant: from `low` on there is enough, `low_count` of them; from `high` on there is not, but
    `high_count`, of `high_weight` if WEIGHS.
    """
    step = tl.full((), 0, tl.int32)
    while (low_count - high_count > LISTED) & (low + 1 < high):
        # Halving values is quick where logits lie evenly, halving keys is sure to come to an end.
        middle = (low & high) + ((low ^ high) >> 1)
        value = to_key(0.5 * from_key(low) + 0.5 * from_key(high - 1))
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

    from_count = low_count
    if low + 1 < high:
        # The scratch may still be read by the search before.
        tl.debug_barrier()
        filled = tl.full((), 0, tl.int32)
        for start in range(0, VOCAB, TILE):
            _, keys = _load_tile(row, start, VOCAB, TILE)
            between = ((keys >= low) & (keys < high)).to(tl.int32)
            places = filled + tl.cumsum(between, 0) - 1
            tl.store(scratch + places, keys, mask=(between > 0) & (places < LISTED))
            filled += tl.sum(between, 0)
        tl.debug_barrier()
        columns = tl.arange(0, LISTED)
        keys = tl.load(scratch + columns, mask=columns < filled, other=NO_KEY)
        weights = weigh(from_key(keys), peak, temperature)
        low, from_count, high_count, high_weight = halve(
            keys, weights, low, low_count, high, high_count, high_count, high_weight, wanted_count,
            wanted_weight, WEIGHS,
        )  # fmt: skip
    return low, from_count, high_count, high_weight


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
def truncate_alone(
    row: tl.tensor,
    scratch: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    high_count: tl.tensor,
    high_weight: tl.tensor,
    cuts: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    wanted: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """See `truncate_list`. `scratch` has room for LISTED keys."""
    threshold, from_count = low, low_count
    above = tl.full((), 0, tl.int32)
    equals = low_count
    if cuts:
        threshold, from_count, above, _weight = _search(
            row, scratch, low, low_count, high, high_count, high_weight, k, wanted, peak,
            temperature, False, VOCAB, TILE, LISTED,
        )  # fmt: skip
        equals = k - above
        if p < 1.0:
            _count, of_above = _weigh_from(row, threshold + 1, peak, temperature, True, VOCAB, TILE)
            of_equal = weigh(from_key(threshold), peak, temperature).to(tl.float64)
            wanted = p * (of_above + equals.to(tl.float64) * of_equal)
            low, low_count = threshold, from_count
            high, high_count, high_weight = to_key(peak) + 1, above * 0, high_weight * 0
    if p < 1.0:
        found, from_count, above, above_weight = _search(
            row, scratch, low, low_count, high, high_count, high_weight, k, wanted, peak,
            temperature, True, VOCAB, TILE, LISTED,
        )  # fmt: skip
        most = tl.where(cuts & (found == threshold), equals, from_count - above)
        equals = equals_within(wanted, above_weight, found, most, peak, temperature)
        threshold = found
    last = tl.full((), VOCAB, tl.int32)
    if equals < from_count - above:
        last = _last_of_equals(row, threshold, equals, VOCAB, TILE)
    return threshold, last
