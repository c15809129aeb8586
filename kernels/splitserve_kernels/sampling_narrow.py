"""The second pass of `sampling`: a row's bracket becomes narrower."""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve_kernels.early_launch import wait_for_the_kernel_before
from splitserve_kernels.sampling_keys import (
    COUNTS,
    CUTS,
    HIGH,
    HIGH_COUNT,
    HIGH_COUNTS,
    HIGH_WEIGHT,
    LOW,
    LOW_COUNT,
    LOW_COUNTS,
    MOST_KEY,
    NARROWED,
    NARROWING,
    NO_KEY,
    PEAK,
    STAGE,
    THRESHOLDS,
    TRIED,
    WANTED,
    WEIGHTS,
    chunk_ints,
    chunk_reals,
    from_key,
    load_logits,
    read,
    row_ints,
    row_reals,
    to_key,
    weigh,
)
from splitserve_kernels.small_tiles import arrive


@triton.jit
def narrow(
    # pointers
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    uniforms: tl.tensor,
    ints: tl.tensor,
    reals: tl.tensor,
    arrived: tl.tensor,
    out: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Counts, or weighs, what is above each of the tried keys, and narrows the bracket by them."""
    if EARLY:
        wait_for_the_kernel_before()
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ints, reals = row_ints(ints, number, NUM, LISTED), row_reals(reals, number, NUM)
    if read(ints + STAGE) != NARROWING:
        return
    cuts = read(ints + CUTS) > 0
    # Read once: among the stores below each read would wait for the L2 cache in its turn.
    tries = tl.arange(0, THRESHOLDS)
    tried = read(ints + TRIED + tries)
    x = load_logits(logits + number * stride, chunk * CHUNK + tl.arange(0, CHUNK), VOCAB)
    counts, sums = chunk_ints(ints, COUNTS, NUM) + chunk, chunk_reals(reals, WEIGHTS, NUM) + chunk
    if cuts:
        for each in tl.static_range(THRESHOLDS):
            above = x >= from_key(tl.sum(tl.where(tries == each, tried, 0), 0))
            tl.store(counts + each * NUM, tl.sum(above.to(tl.int32), 0))
    else:
        weights = weigh(x, read(reals + PEAK).to(tl.float32), tl.load(temperatures + number))
        for each in tl.static_range(THRESHOLDS):
            above = x >= from_key(tl.sum(tl.where(tries == each, tried, 0), 0))
            tl.store(counts + each * NUM, tl.sum(above.to(tl.int32), 0))
            weight = tl.sum(tl.where(above, weights, 0.0), 0)
            tl.store(sums + each * NUM, weight.to(tl.float64))
    if arrive(arrived, number, NUM):
        k = tl.load(top_k + number).to(tl.int32)
        _close_in(ints, reals, k, cuts & (tl.load(top_p + number) < 1.0), NUM, CHUNKS, LISTED)


@triton.jit
def _close_in(
    ints: tl.tensor,
    reals: tl.tensor,
    k: tl.tensor,
    both: tl.tensor,
    NUM: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
) -> None:
    """Note the narrower bracket, and what to try next if it is too wide for the list."""
    weighs = read(ints + CUTS) == 0
    tries, chunks = tl.arange(0, THRESHOLDS), tl.arange(0, CHUNKS)
    places = tries[:, None] * NUM + chunks[None, :]
    by_chunk = tl.load(
        chunk_ints(ints, COUNTS, NUM) + places,
        mask=chunks[None, :] < NUM,
        other=0,
        cache_modifier=".cg",
    )
    weights = tl.load(
        chunk_reals(reals, WEIGHTS, NUM) + places,
        mask=chunks[None, :] < tl.where(weighs, NUM, 0),
        other=0.0,
        cache_modifier=".cg",
    )
    tried = read(ints + TRIED + tries)
    counts, weights = tl.sum(by_chunk, 1), tl.sum(weights, 1)
    enough = tl.where(weighs, weights >= read(reals + WANTED), counts >= k)
    # From LOW on there is enough, even where the sum of it all is rounded to less than is wanted.
    short = (enough == 0) & (tried > read(ints + LOW))

    low = tl.maximum(read(ints + LOW), tl.max(tl.where(enough, tried, NO_KEY), 0))
    high = tl.minimum(read(ints + HIGH), tl.min(tl.where(short, tried, MOST_KEY), 0))
    at_low = tl.max(tl.where(enough & (tried == low), tries, -1), 0)
    at_high = tl.max(tl.where(short & (tried == high), tries, -1), 0)
    # A bound that has moved is one of the tried; the other stays as it is noted.
    low_counts = tl.sum(tl.where(tries[:, None] == at_low, by_chunk, 0), 0)
    high_counts = tl.sum(tl.where(tries[:, None] == at_high, by_chunk, 0), 0)
    moved = chunks < tl.where(at_low >= 0, NUM, 0)
    tl.store(chunk_ints(ints, LOW_COUNTS, NUM) + chunks, low_counts, mask=moved)
    moved = chunks < tl.where(at_high >= 0, NUM, 0)
    tl.store(chunk_ints(ints, HIGH_COUNTS, NUM) + chunks, high_counts, mask=moved)
    low_count = tl.where(at_low >= 0, tl.sum(low_counts, 0), read(ints + LOW_COUNT))
    high_count = tl.where(at_high >= 0, tl.sum(high_counts, 0), read(ints + HIGH_COUNT))
    high_weight = tl.sum(tl.where(tries == at_high, weights, 0.0), 0)
    high_weight = tl.where(at_high >= 0, high_weight, read(reals + HIGH_WEIGHT))

    between = low_count - tl.where(both, 0, high_count)
    fits = (low_count <= LISTED) | (between <= LISTED)
    start, stop = from_key(low), from_key(high - 1)
    step = stop * (1.0 / (THRESHOLDS + 1)) - start * (1.0 / (THRESHOLDS + 1))
    # Programs of the row have all read what was tried, as they have all arrived.
    tl.store(ints + TRIED + tries, to_key(start + step * (tries + 1).to(tl.float32)))
    tl.store(ints + LOW, low)
    tl.store(ints + LOW_COUNT, low_count)
    tl.store(ints + HIGH, high)
    tl.store(ints + HIGH_COUNT, high_count)
    tl.store(reals + HIGH_WEIGHT, high_weight)
    tl.store(ints + STAGE, tl.where(fits, NARROWED, NARROWING))
