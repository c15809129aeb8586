"""The last passes of `sampling`: a row's list, its threshold, and its token."""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve_kernels.early_launch import wait_for_the_kernel_before
from splitserve_kernels.sampling_alone import truncate_alone
from splitserve_kernels.sampling_keys import (
    CUTS,
    DRAWN,
    GREEDY,
    HIGH,
    HIGH_COUNT,
    HIGH_COUNTS,
    HIGH_WEIGHT,
    KEPT,
    LAST,
    LOW,
    LOW_COUNT,
    LOW_COUNTS,
    MOST_KEY,
    NARROWED,
    NO_KEY,
    PEAK,
    STAGE,
    SUMS,
    WANTED,
    chunk_ints,
    chunk_reals,
    from_key,
    keep,
    list_of,
    load_logits,
    reach,
    read,
    read_chunks,
    row_ints,
    row_reals,
    to_key,
    weigh,
)
from splitserve_kernels.sampling_list import truncate_list
from splitserve_kernels.small_tiles import arrive


@triton.jit
def enlist(
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
    """Lists a row's bracket, or all from its LOW on if there is room: keys, and their tokens."""
    if EARLY:
        wait_for_the_kernel_before()
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ints = row_ints(ints, number, NUM, LISTED)
    if read(ints + STAGE) != NARROWED:
        return
    low, high = read(ints + LOW), read(ints + HIGH)
    whole = read(ints + LOW_COUNT) <= LISTED
    chunks = tl.arange(0, CHUNKS)
    counts = read_chunks(chunk_ints(ints, LOW_COUNTS, NUM), NUM, CHUNKS, 0)
    not_listed = read_chunks(chunk_ints(ints, HIGH_COUNTS, NUM), NUM, CHUNKS, 0)
    counts -= tl.where(whole, 0, not_listed)
    if tl.sum(tl.where(chunks == chunk, counts, 0), 0) == 0:
        return
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    keys = to_key(load_logits(logits + number * stride, columns, VOCAB))
    hits = (keys >= low) & (keys < tl.where(whole, MOST_KEY, high))
    before = tl.sum(tl.where(chunks < chunk, counts, 0), 0)
    at = before + tl.cumsum(hits.to(tl.int32), 0) - 1
    # Earlier passes have counted that there is room. Were they wrong, nothing beside the list would
    # be written. This costs nothing, where a mask of `at` has the compiler spill registers.
    places = list_of(ints, NUM) + tl.minimum(at, LISTED - 1)
    tl.store(places, keys, mask=hits)
    tl.store(places + LISTED, columns, mask=hits)


@triton.jit
def settle(
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
    """Finds the threshold, one program a row. Draws where all that is kept is in the list."""
    if EARLY:
        wait_for_the_kernel_before()
    number = tl.program_id(1).to(tl.int64)
    ints, reals = row_ints(ints, number, NUM, LISTED), row_reals(reals, number, NUM)
    stage = read(ints + STAGE)
    if (stage == DRAWN) | (stage == KEPT):
        return
    low, high = read(ints + LOW), read(ints + HIGH)
    low_count, high_count = read(ints + LOW_COUNT), read(ints + HIGH_COUNT)
    cuts, wanted = read(ints + CUTS) > 0, read(reals + WANTED)
    peak, high_weight = read(reals + PEAK).to(tl.float32), read(reals + HIGH_WEIGHT)
    temperature = tl.load(temperatures + number)
    k, p = tl.load(top_k + number).to(tl.int32), tl.load(top_p + number).to(tl.float64)
    listed, whole = list_of(ints, NUM), low_count <= LISTED
    if stage == NARROWED:
        places = tl.arange(0, LISTED)
        used = places < low_count - tl.where(whole, 0, high_count)
        keys = tl.load(listed + places, mask=used, other=NO_KEY, cache_modifier=".cg")
        tokens = tl.load(listed + LISTED + places, mask=used, other=-1, cache_modifier=".cg")
        weights = tl.where(used, weigh(from_key(keys), peak, temperature), 0.0)
        threshold, last = truncate_list(
            keys, tokens, weights, low, low_count, high, high_count, high_weight, whole, cuts,
            k, p, wanted, peak, temperature, VOCAB,
        )  # fmt: skip
        if whole:
            least_weight = tl.load(min_p + number).to(tl.float32)
            kept = keep(weights, keys, tokens, threshold, last, least_weight)
            target = tl.load(uniforms + number).to(tl.float64) * tl.sum(kept, 0)
            token = reach(kept, tokens, target, read(ints + GREEDY))
            tl.store(out + number, token.to(tl.int64))
    else:
        threshold, last = truncate_alone(
            logits + number * stride, listed, low, low_count, high, high_count, high_weight, cuts,
            k, p, wanted, peak, temperature, VOCAB, CHUNK, LISTED,
        )  # fmt: skip
    tl.store(ints + LOW, threshold)
    tl.store(ints + LAST, last)
    tl.store(ints + STAGE, tl.where((stage == NARROWED) & whole, DRAWN, KEPT))


@triton.jit
def draw(
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
    """Sums each chunk's kept weights; the chunk that the uniform falls into is gone over again."""
    if EARLY:
        wait_for_the_kernel_before()
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = logits + number * stride
    ints, reals = row_ints(ints, number, NUM, LISTED), row_reals(reals, number, NUM)
    if read(ints + STAGE) != KEPT:
        return
    threshold, last = read(ints + LOW), read(ints + LAST)
    peak, temperature = read(reals + PEAK).to(tl.float32), tl.load(temperatures + number)
    least_weight = tl.load(min_p + number).to(tl.float32)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(row, columns, VOCAB)
    kept = keep(weigh(x, peak, temperature), to_key(x), columns, threshold, last, least_weight)
    tl.store(chunk_reals(reals, SUMS, NUM) + chunk, tl.sum(kept, 0))
    if arrive(arrived, number, NUM):
        chunks = tl.arange(0, CHUNKS)
        sums = read_chunks(chunk_reals(reals, SUMS, NUM), NUM, CHUNKS, 0.0)
        target = tl.load(uniforms + number).to(tl.float64) * tl.sum(sums, 0)
        chosen = reach(sums, chunks, target, tl.full((), 0, tl.int32))
        before = tl.sum(tl.where(chunks < chosen, sums, 0.0), 0)
        columns = chosen * CHUNK + tl.arange(0, CHUNK)
        x = load_logits(row, columns, VOCAB)
        kept = keep(weigh(x, peak, temperature), to_key(x), columns, threshold, last, least_weight)
        token = reach(kept, columns, target - before, read(ints + GREEDY))
        tl.store(out + number, token.to(tl.int64))
