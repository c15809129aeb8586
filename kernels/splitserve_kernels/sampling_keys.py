"""What every pass of `sampling` shares: keys and weights of logits, and where a row's notes lie.

A key is an int32 in the order of fp32 logits. A weight is exp((logit - peak) / temperature) in
fp32: 1 for the greatest logit, 0 for one that is infinitely below it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from splitserve_kernels.argmax import lowest_of

THRESHOLDS = tl.constexpr(8)
"""How many keys one narrowing pass tries at once."""

# A row's stage: what is still to be done.
DRAWN, NARROWING, NARROWED, KEPT = (tl.constexpr(stage) for stage in range(4))

# int32 notes of a row. A bracket is [LOW, HIGH): from LOW on there is enough, from HIGH on not.
STAGE, GREEDY, CUTS, LOW, LOW_COUNT, HIGH, HIGH_COUNT, LAST = (tl.constexpr(i) for i in range(8))
TRIED = tl.constexpr(8)
"""The THRESHOLDS keys of the next pass."""
_ROW_INTS = tl.constexpr(16)

# int32 notes of a row's chunks, behind the row's own; each is one number a chunk.
TOKENS, LOW_COUNTS, HIGH_COUNTS, COUNTS = (tl.constexpr(i) for i in range(4))
_CHUNK_INTS = tl.constexpr(11)

# fp64 notes of a row, and behind them of its chunks. A later pass's take an earlier one's places.
PEAK, WANTED, HIGH_WEIGHT = (tl.constexpr(i) for i in range(3))
_ROW_REALS = tl.constexpr(4)
SUMS, PEAKS, LEASTS, SQUARES = (tl.constexpr(i) for i in range(4))
WEIGHTS = tl.constexpr(0)
_CHUNK_REALS = tl.constexpr(8)

NO_KEY = tl.constexpr(-0x80000000)
MOST_KEY = tl.constexpr(0x7FFFFFFF)

_MOST_LOGIT = tl.constexpr(torch.finfo(torch.float32).max)
# exp(-104) is zero in fp32.
_LEAST_EXPONENT = tl.constexpr(-104.0)


def notes_of_row(chunks: int, listed: int) -> tuple[int, int]:
    """How many int32 and how many fp64 numbers are noted of a row."""
    ints = _ROW_INTS.value + _CHUNK_INTS.value * chunks + 2 * listed
    return ints, _ROW_REALS.value + _CHUNK_REALS.value * chunks


@triton.jit
def row_ints(ints: tl.tensor, row: tl.tensor, NUM: tl.constexpr, LISTED: tl.constexpr) -> tl.tensor:
    """Where a row's int32 notes begin."""
    return ints + row * (_ROW_INTS + _CHUNK_INTS * NUM + 2 * LISTED)


@triton.jit
def row_reals(reals: tl.tensor, row: tl.tensor, NUM: tl.constexpr) -> tl.tensor:
    """Where a row's fp64 notes begin."""
    return reals + row * (_ROW_REALS + _CHUNK_REALS * NUM)


@triton.jit
def chunk_ints(notes: tl.tensor, field: tl.constexpr, NUM: tl.constexpr) -> tl.tensor:
    """Where an int32 note of a row's chunks begins."""
    return notes + _ROW_INTS + field * NUM


@triton.jit
def chunk_reals(notes: tl.tensor, field: tl.constexpr, NUM: tl.constexpr) -> tl.tensor:
    """Where an fp64 note of a row's chunks begins."""
    return notes + _ROW_REALS + field * NUM


@triton.jit
def list_of(notes: tl.tensor, NUM: tl.constexpr) -> tl.tensor:
    """Where a row's listed keys begin; their tokens follow."""
    return notes + _ROW_INTS + _CHUNK_INTS * NUM


@triton.jit
def read(place: tl.tensor) -> tl.tensor:
    """A note that another program left: not from the L1 cache, which its stores do not reach."""
    return tl.load(place, cache_modifier=".cg")


@triton.jit
def read_chunks(
    place: tl.tensor, count: tl.tensor, CHUNKS: tl.constexpr, other: tl.constexpr
) -> tl.tensor:
    """(CHUNKS,): a note of each of the first `count` chunks, `other` of the rest."""
    chunks = tl.arange(0, CHUNKS)
    return tl.load(place + chunks, mask=chunks < count, other=other, cache_modifier=".cg")


@triton.jit
def to_key(x: tl.tensor) -> tl.tensor:
    """int32 in the order of fp32 `x`; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key: tl.tensor) -> tl.tensor:
    """The fp32 number of a key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(x: tl.tensor, peak: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """exp((x - peak) / temperature), zero for what is infinitely below, or if the peak is -inf."""
    least = temperature * _LEAST_EXPONENT
    below = tl.maximum(x - tl.maximum(peak, -_MOST_LOGIT), least)
    return tl.where(below > least, tl.exp(below / temperature), 0.0)


@triton.jit
def load_logits(row: tl.tensor, columns: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """fp32 logits, -inf past the end and for what is not a number; +inf is the greatest number."""
    x = tl.load(row + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, _MOST_LOGIT), float("-inf"))


@triton.jit
def keep(
    weights: tl.tensor,
    keys: tl.tensor,
    tokens: tl.tensor,
    threshold: tl.tensor,
    last: tl.tensor,
    least_weight: tl.tensor,
) -> tl.tensor:
    """Weights in fp64, zero for tokens that truncation takes away: those below the threshold, those
    equal to it behind token `last`, and those of less than `least_weight`.
    """
    kept = (keys > threshold) | ((keys == threshold) & (tokens <= last))
    return tl.where(kept & (weights >= least_weight), weights, 0.0).to(tl.float64)


@triton.jit
def reach(sums: tl.tensor, places: tl.tensor, target: tl.tensor, least: tl.tensor) -> tl.tensor:
    """The least of ascending int32 `places` at which fp64 `sums`, added up, exceed the target.

    Rounding may keep the last from exceeding it: the last place that has a weight then, or `least`.
    """
    hits = (tl.cumsum(sums, 0) > target) & (sums > 0)
    first = lowest_of(hits, places)
    likely = tl.max(tl.where(sums > 0, places, least), 0)
    return tl.where(tl.max(hits.to(tl.int32), 0) > 0, first, likely)
