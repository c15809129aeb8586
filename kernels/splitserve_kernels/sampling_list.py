"""Truncation within a row's list: keys that hold the threshold, in the order of their tokens.

A list is whole if it has all keys from the bracket's LOW on, else it has the bracket's only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve_kernels.sampling_keys import MOST_KEY, from_key, to_key, weigh


@triton.jit
def halve(
    keys: tl.tensor,
    weights: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    high_count: tl.tensor,
    base_count: tl.tensor,
    base_weight: tl.tensor,
    wanted_count: tl.tensor,
    wanted_weight: tl.tensor,
    WEIGHS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The greatest key such that what is not below it reaches the wanted count, or weight if
    WEIGHS. Also how many are not below it, how many are above, and the latter's weight, fp64.

    Invariant: from `low` on there is enough, `low_count` of them; from `high` on there is not.
    Above the list there are `base_count` more keys, of `base_weight`.
    """
    while (low_count - high_count > 1) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        above = keys >= middle
        count = base_count + tl.sum(above.to(tl.int32), 0)
        enough = count >= wanted_count
        if WEIGHS:
            weight = base_weight + tl.sum(tl.where(above, weights, 0.0), 0).to(tl.float64)
            enough = weight >= wanted_weight
        low = tl.where(enough, middle, low)
        low_count = tl.where(enough, count, low_count)
        high = tl.where(enough, high, middle)
        high_count = tl.where(enough, high_count, count)
    # What is left in the bracket has one key.
    threshold = tl.min(tl.where(keys >= low, keys, MOST_KEY), 0)
    above = keys > threshold
    from_count = base_count + tl.sum((keys >= threshold).to(tl.int32), 0)
    above_count = base_count + tl.sum(above.to(tl.int32), 0)
    above_weight = base_weight
    if WEIGHS:
        above_weight += tl.sum(tl.where(above, weights, 0.0), 0).to(tl.float64)
    return threshold, from_count, above_count, above_weight


@triton.jit
def equals_within(
    wanted: tl.tensor,
    above_weight: tl.tensor,
    threshold: tl.tensor,
    most: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
) -> tl.tensor:
    """How many keys that equal the threshold the wanted weight takes, from 1 to `most`."""
    of_equal = tl.maximum(weigh(from_key(threshold), peak, temperature), 1e-37).to(tl.float64)
    short = tl.minimum((wanted - above_weight) / of_equal, most.to(tl.float64))
    return tl.maximum(tl.ceil(short).to(tl.int32), 1)


@triton.jit
def truncate_list(
    keys: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    low: tl.tensor,
    low_count: tl.tensor,
    high: tl.tensor,
    high_count: tl.tensor,
    high_weight: tl.tensor,
    whole: tl.tensor,
    cuts: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    wanted: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The least key that is kept and the last token of those that have it.

    The bracket is that of the greatest `k` where these are cut off (`cuts`), else that of the
    weight `wanted`. The list must be whole where both k and p truncate.
    """
    base_count = tl.where(whole, 0, high_count)
    base_weight = tl.where(whole, 0.0, high_weight)
    threshold, from_count = low, low_count
    above = tl.full((), 0, tl.int32)
    equals = low_count
    if cuts:
        threshold, from_count, above, _weight = halve(
            keys, weights, low, low_count, high, high_count, base_count, base_weight, k, wanted,
            False,
        )  # fmt: skip
        equals = k - above
        if p < 1.0:
            of_equal = weigh(from_key(threshold), peak, temperature).to(tl.float64)
            of_above = tl.sum(tl.where(keys > threshold, weights, 0.0), 0).to(tl.float64)
            wanted = p * (of_above + equals.to(tl.float64) * of_equal)
            low, low_count = threshold, from_count
            high, high_count = to_key(peak) + 1, above * 0
    if p < 1.0:
        found, from_count, above, above_weight = halve(
            keys, weights, low, low_count, high, high_count, base_count, base_weight, k, wanted,
            True,
        )  # fmt: skip
        most = tl.where(cuts & (found == threshold), equals, from_count - above)
        equals = equals_within(wanted, above_weight, found, most, peak, temperature)
        threshold = found
    last = tl.full((), VOCAB, tl.int32)
    if equals < from_count - above:
        equal = (keys == threshold).to(tl.int32)
        hits = (equal > 0) & (tl.cumsum(equal, 0) == equals)
        last = tl.max(tl.where(hits, tokens, 0), 0)
    return threshold, last
