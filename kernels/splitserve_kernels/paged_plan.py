"""How a step's decode attention is cut into equal runs, computed on the device.

All work, (sequence, KV head, unit of tokens) in this order, is one line that is cut into as many
runs of the same length as there are programs, as stream-K does for matrix products (Osama et al.
2023). After the units of each (sequence, KV head) comes one more that stands for the time it takes
to begin and end with it. So the time depends on how much there is in all, not on whose it is. Every
shape depends on the number of sequences alone: a plan can be made in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_TOKENS = 64
"""What a run is counted in. A window's units begin at a multiple of it, too."""

_PROGRAMS_PER_PROCESSOR = 2
_LEAST_RUN = 2
_TILE_PROGRAMS = 8


@dataclass(frozen=True)
class DecodePlan:
    """Serves all layers of a step with this window, one after another on one stream."""

    begins: Tensor
    """(programs, 4) int32: the sequence in which each program's run begins (the number of
    sequences if there is nothing left to do), units of one KV head in the sequences before, tokens
    of that sequence, and how many units a run has.
    """
    arrivals: Tensor
    """(sequences, kv_heads) int32: how many runs that share a head are done. 0 between launches:
    the last one resets it.
    """
    window: int | None

    @property
    def programs(self) -> int:
        """How many runs."""
        return self.begins.shape[0]


def plan_decode(
    lengths: Tensor, *, kv_heads: int, num_processors: int, window: int | None = None
) -> DecodePlan:
    """Plan for sequences of `lengths`, (sequences,) int32 or int64. Launches one small kernel."""
    sequences, device = lengths.shape[0], lengths.device
    programs = _PROGRAMS_PER_PROCESSOR * num_processors
    plan = DecodePlan(
        begins=torch.empty((programs, 4), dtype=torch.int32, device=device),
        arrivals=torch.empty((sequences, kv_heads), dtype=torch.int32, device=device),
        window=window,
    )
    _plan[(triton.cdiv(programs, _TILE_PROGRAMS),)](
        lengths,
        plan.begins,
        plan.arrivals,
        sequences,
        kv_heads,
        programs,
        window,
        LEAST_RUN=_LEAST_RUN,
        UNIT_TOKENS=UNIT_TOKENS,
        TILE_SEQUENCES=min(1024, max(16, triton.next_power_of_2(sequences))),
        TILE_PROGRAMS=_TILE_PROGRAMS,
        num_warps=4,
    )
    return plan


@triton.jit
def seen_range(
    length: tl.tensor, window: tl.tensor, UNIT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first token that a sequence's last one sees, where its first unit begins, and how many
    units it has: at least 1, so that a sequence of no tokens gets its zeros.
    """
    least = tl.zeros_like(length)
    if window is not None:
        least = tl.maximum(length - window, 0)
    origin = least // UNIT * UNIT
    return least, origin, tl.maximum(tl.cdiv(length - origin, UNIT), 1)


@triton.jit
def _count_units(
    lengths: tl.tensor,
    sequence: tl.tensor,
    sequences: tl.tensor,
    window: tl.tensor,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """Units of one KV head, the one for the time between included."""
    live = sequence < sequences
    length = tl.load(lengths + sequence, mask=live, other=0).to(tl.int32)
    _, _, units = seen_range(length, window, UNIT)
    return tl.where(live, units + 1, 0)


@triton.jit(do_not_specialize=["sequences", "kv_heads", "programs", "window"])
def _plan(
    # pointers
    lengths: tl.tensor,
    begins: tl.tensor,
    arrivals: tl.tensor,
    # sizes
    sequences: tl.tensor,
    kv_heads: tl.tensor,
    programs: tl.tensor,
    window: tl.tensor,
    # constants
    LEAST_RUN: tl.constexpr,
    UNIT_TOKENS: tl.constexpr,
    TILE_SEQUENCES: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
) -> None:
    """Find where a few runs begin, and clear a part of the arrivals."""
    block = tl.program_id(0)
    units = 0
    most = 0
    for at in range(0, sequences, TILE_SEQUENCES):
        sequence = at + tl.arange(0, TILE_SEQUENCES)
        count = _count_units(lengths, sequence, sequences, window, UNIT_TOKENS)
        units += tl.sum(count)
        most = tl.maximum(most, tl.max(count))

    run = tl.maximum(tl.cdiv(units * kv_heads, programs), LEAST_RUN)
    # Of equal sequences runs are a number of whole ones, if that makes them little longer.
    whole = tl.cdiv(run, most) * most
    if (units == most * sequences) & (whole <= run + run // 16):
        run = whole
    program = block * TILE_PROGRAMS + tl.arange(0, TILE_PROGRAMS)
    begin = program * run
    seen = 0
    passed = tl.zeros([TILE_PROGRAMS], tl.int32)
    before = tl.zeros([TILE_PROGRAMS], tl.int32)
    for at in range(0, sequences, TILE_SEQUENCES):
        sequence = at + tl.arange(0, TILE_SEQUENCES)
        count = _count_units(lengths, sequence, sequences, window, UNIT_TOKENS)
        ends = seen + tl.cumsum(count, 0)
        ended = (ends * kv_heads)[None, :] <= begin[:, None]
        ended = (ended & (sequence < sequences)[None, :]).to(tl.int32)
        passed += tl.sum(ended, 1)
        before += tl.sum(ended * count[None, :], 1)
        seen += tl.sum(count)
    live = program < programs
    length = tl.load(lengths + passed, mask=live & (passed < sequences), other=0).to(tl.int32)
    tl.store(begins + program * 4, passed, mask=live)
    tl.store(begins + program * 4 + 1, before, mask=live)
    tl.store(begins + program * 4 + 2, length, mask=live)
    tl.store(begins + program * 4 + 3, tl.zeros_like(program) + run, mask=live)

    stride = tl.num_programs(0) * TILE_SEQUENCES
    for at in range(block * TILE_SEQUENCES, sequences * kv_heads, stride):
        item = at + tl.arange(0, TILE_SEQUENCES)
        tl.store(arrivals + item, tl.zeros_like(item), mask=item < sequences * kv_heads)
