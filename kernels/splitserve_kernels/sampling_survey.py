"""The first pass of `sampling`: a row's peak and weights, and what is to be looked for in it."""

from __future__ import annotations

import triton
import triton.language as tl

from splitserve_kernels.argmax import lowest_of
from splitserve_kernels.early_launch import wait_for_the_kernel_before
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
    LEASTS,
    LOW,
    LOW_COUNT,
    LOW_COUNTS,
    NARROWING,
    NO_KEY,
    PEAK,
    PEAKS,
    SQUARES,
    STAGE,
    SUMS,
    THRESHOLDS,
    TOKENS,
    TRIED,
    WANTED,
    chunk_ints,
    chunk_reals,
    load_logits,
    reach,
    read_chunks,
    row_ints,
    row_reals,
    to_key,
    weigh,
)
from splitserve_kernels.small_tiles import arrive


@triton.jit
def survey(
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
    """The first pass: peaks and weights. Draws greedy rows and those that keep all tokens."""
    if EARLY:
        wait_for_the_kernel_before()
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = logits + number * stride
    ints, reals = row_ints(ints, number, NUM, LISTED), row_reals(reals, number, NUM)
    temperature = tl.load(temperatures + number)
    is_greedy = temperature == 0
    temperature = tl.where(is_greedy, 1.0, temperature)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(row, columns, VOCAB)
    peak = tl.max(x, 0)
    weights = weigh(x, peak, temperature)
    tl.store(chunk_ints(ints, TOKENS, NUM) + chunk, lowest_of(x == peak, columns))
    tl.store(chunk_reals(reals, SUMS, NUM) + chunk, tl.sum(weights.to(tl.float64), 0))
    tl.store(chunk_reals(reals, PEAKS, NUM) + chunk, peak.to(tl.float64))
    k, p = tl.load(top_k + number).to(tl.int32), tl.load(top_p + number).to(tl.float64)
    if (k > 0) | (p < 1.0):
        finite = x > float("-inf")
        tl.store(chunk_ints(ints, LOW_COUNTS, NUM) + chunk, tl.sum(finite.to(tl.int32), 0))
        tl.store(chunk_ints(ints, HIGH_COUNTS, NUM) + chunk, 0)
        least = tl.min(tl.where(finite, x, float("inf")), 0)
        tl.store(chunk_reals(reals, LEASTS, NUM) + chunk, least.to(tl.float64))
        squares = tl.sum(weights * weights, 0)
        tl.store(chunk_reals(reals, SQUARES, NUM) + chunk, squares.to(tl.float64))
    if arrive(arrived, number, NUM):
        least_weight = tl.load(min_p + number).to(tl.float32)
        uniform = tl.load(uniforms + number).to(tl.float64)
        _plan(
            row, ints, reals, out + number, is_greedy, temperature, k, p, least_weight, uniform,
            VOCAB, CHUNK, NUM, CHUNKS,
        )  # fmt: skip


@triton.jit
def _plan(
    row: tl.tensor,
    ints: tl.tensor,
    reals: tl.tensor,
    out: tl.tensor,
    is_greedy: tl.tensor,
    temperature: tl.tensor,
    k: tl.tensor,
    p: tl.tensor,
    least_weight: tl.tensor,
    uniform: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Draw the row if nothing has to be cut off, else note what is to be looked for, and where."""
    chunks = tl.arange(0, CHUNKS)
    peaks = read_chunks(chunk_reals(reals, PEAKS, NUM), NUM, CHUNKS, float("-inf")).to(tl.float32)
    peak = tl.max(peaks, 0)
    tokens = read_chunks(chunk_ints(ints, TOKENS, NUM), NUM, CHUNKS, 0x7FFFFFFF)
    greedy = lowest_of(peaks == peak, tokens)
    scales = weigh(peaks, peak, temperature).to(tl.float64)
    sums = read_chunks(chunk_reals(reals, SUMS, NUM), NUM, CHUNKS, 0.0) * scales
    total = tl.sum(sums, 0)
    noted = tl.where((k > 0) | (p < 1.0), NUM, 0)
    count = tl.sum(read_chunks(chunk_ints(ints, LOW_COUNTS, NUM), noted, CHUNKS, 0), 0)
    is_drawn = (is_greedy == 0) & (total > 0)
    cuts = (k > 0) & (k < count)
    searches = cuts | (p < 1.0)
    stage = tl.where(searches, NARROWING, tl.where(least_weight > 0, KEPT, DRAWN))
    stage = tl.where(is_drawn, stage, DRAWN)
    tl.store(ints + STAGE, stage)
    tl.store(ints + GREEDY, greedy)
    tl.store(ints + LOW, NO_KEY)
    tl.store(ints + LAST, VOCAB)
    tl.store(reals + PEAK, peak.to(tl.float64))
    if stage == NARROWING:
        leasts = read_chunks(chunk_reals(reals, LEASTS, NUM), NUM, CHUNKS, float("inf"))
        least = tl.min(leasts.to(tl.float32), 0)
        squares = read_chunks(chunk_reals(reals, SQUARES, NUM), NUM, CHUNKS, 0.0)
        squares = tl.sum(squares * scales * scales, 0)
        tl.store(ints + CUTS, cuts.to(tl.int32))
        tl.store(ints + LOW, to_key(least))
        tl.store(ints + LOW_COUNT, count)
        tl.store(ints + HIGH, to_key(peak) + 1)
        tl.store(ints + HIGH_COUNT, 0)
        tl.store(reals + WANTED, p * total)
        tl.store(reals + HIGH_WEIGHT, tl.full((), 0.0, tl.float64))
        # What is below `lower` weighs less than top-p takes away, and what is above `upper` less
        # than it keeps: weights of at least w add up to (sum of squares) / w at most.
        lower = tl.maximum((1.0 - p) * total / VOCAB, 1e-37).to(tl.float32)
        upper = tl.minimum(squares / tl.maximum(p * total, 1e-37), 1.0).to(tl.float32)
        first = tl.maximum(least, tl.where(cuts, least, peak + temperature * tl.log(lower)))
        end = tl.minimum(peak, tl.where(cuts, peak, peak + temperature * tl.log(upper)))
        tries = tl.arange(0, THRESHOLDS).to(tl.float32)
        evenly = first + (end * (1.0 / THRESHOLDS) - first * (1.0 / THRESHOLDS)) * tries
        guesses = peak + temperature * _guess(tries, total, squares, p, VOCAB)
        guesses = tl.maximum(tl.minimum(guesses, end), first)
        tried = to_key(tl.where(cuts, evenly, guesses))
        tl.store(ints + TRIED + tl.arange(0, THRESHOLDS), tried)
    if stage == DRAWN:
        token = greedy
        if is_drawn:
            chosen = reach(sums, chunks, uniform * total, tl.full((), 0, tl.int32))
            before = tl.sum(tl.where(chunks < chosen, sums, 0.0), 0)
            own = tl.max(tl.where(chunks == chosen, peaks, float("-inf")), 0)
            scale = weigh(own, peak, temperature).to(tl.float64)
            columns = chosen * CHUNK + tl.arange(0, CHUNK)
            weights = weigh(load_logits(row, columns, VOCAB), own, temperature).to(tl.float64)
            token = reach(weights, columns, (uniform * total - before) / scale, greedy)
        tl.store(out, token.to(tl.int64))


@triton.jit
def _guess(
    tries: tl.tensor, total: tl.tensor, squares: tl.tensor, p: tl.tensor, VOCAB: tl.constexpr
) -> tl.tensor:
    """Logarithms of weights around the top-p threshold of logits that are normally distributed.

    Their variance and mean follow from the sums of weights and of their squares; the normal
    quantile is Abramowitz and Stegun's 26.2.22. Guesses lie from 0.02 to 1.8 standard deviations to
    either side. Where they are far off, the bracket stays wide, and that is all.
    """
    variance = tl.maximum(tl.log((squares * VOCAB / (total * total)).to(tl.float32)), 0.0)
    deviation = tl.sqrt(variance)
    tail = tl.maximum(tl.minimum(p, 1.0 - p), 1e-30).to(tl.float32)
    t = tl.sqrt(-2.0 * tl.log(tail))
    quantile = t - (2.30753 + 0.27061 * t) / (1.0 + 0.99229 * t + 0.04481 * t * t)
    quantile = tl.where(p > 0.5, -quantile, quantile)
    middle = tl.log((total / VOCAB).to(tl.float32)) + 0.5 * variance + quantile * deviation
    side = tries - 0.5 * (THRESHOLDS - 1)
    away = 0.02 * tl.exp2(2.17 * (tl.abs(side) - 0.5)) * deviation
    return middle + tl.where(side > 0, away, -away)
