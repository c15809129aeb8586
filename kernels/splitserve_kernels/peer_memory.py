"""Memory that the GPUs of all ranks can reach, and how their kernels wait for each other in it.

Every rank has one block: two halves for messages, and signals. A kernel that uses it is launched by
all ranks, always as `PeerMemory.programs` programs. Each of them

1. adds one to its own number in `PeerMemory.epochs`: that of this launch,
2. stores its part of the message in its own rank's block, in the half of that number (`half_of`),
3. writes the number into its own signal in every rank's block (`signal_peers`),
4. waits until the same program of every rank has done so (`wait_for_peers`), and may then read
   what these have stored.

One that has no part of the message does the first of these only.

What orders what, in the terms of PTX's memory model:

- Data before signal. The stores of all threads, a barrier of the program, then one exchange for
  each rank with release order and system scope. Release is cumulative over the program's barrier:
  who acquires the signal sees the stores of all threads.
- Signal before data. A poll with acquire order and system scope, a barrier of the program, then the
  loads of all threads. The acquire also drops what the processor's first-level cache holds.
- Launches. All launches of a rank are in the order of one stream, and all ranks make the same ones
  in the same order, with messages of the same shapes. A kernel that is launched early does nothing
  of the above before it has waited for the one before it.
- Numbers. They are in the device's memory, so that a graph that is replayed goes on counting. As
  the grid is always the same, all programs of all ranks have the same number in one launch.
- Reuse. Launch n stores in half n % 2, which the others read in launch n - 2. When n begins on this
  rank, its launch n - 1 has ended, and there it has heard from every rank, as no message is empty.
  Each was in its own launch n - 1 then, hence done with n - 2. So parts may be cut otherwise in
  every launch.
- Signals only grow. A rank that is a launch ahead overwrites n by n + 1, and a wait is for n or
  more. 64 bits are never used up; 32 would be within two days.
- Progress. A program waits for its own namesakes on other ranks, for nothing in its own grid. If
  programs start in the order of their numbers, as GPUs start them, the lowest one that has not
  ended is running on all ranks, however few of them fit on one. If they did not, all would have to
  fit at once: `MOST_PROGRAMS` is below the 132 processors of an H100. A kernel that is launched
  early behind this one takes room only when all of this one's programs have started.

A wait of more than `PeerMemory.timeout_s` traps: this rank's later calls to CUDA raise a launch
failure, by which its process ends. What is merely slow is late by less. A rank that dies is noticed
sooner, by the connection that closes with it; its peers' processes end then, and their kernels with
them.

The block could be torch's signal pad, too, but that has to be zero again after each use, which
costs a second exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_RANKS: Final = 8
MOST_BYTES: Final = 512 << 10
"""The longest message: beyond it, every rank reading every other's whole one costs too much."""

MOST_PROGRAMS: Final = 128
_SIGNALS_AT = 2 * MOST_BYTES
BLOCK_BYTES: Final = _SIGNALS_AT + MOST_PROGRAMS * MOST_RANKS * torch.int64.itemsize
"""Two halves, and a signal from each rank to each program, those to one program side by side."""

_FIRST_SIGNAL = tl.constexpr(_SIGNALS_AT)
_PITCH = tl.constexpr(MOST_RANKS)
_POLLS = tl.constexpr(1 << 14)
"""Between looks at the clock: some milliseconds."""


@dataclass(frozen=True)
class PeerMemory:
    """What one rank knows of the memory that all ranks of a group can reach.

    Every rank has a block of `BLOCK_BYTES`, aligned to 16 bytes, that was zeroed before the first
    launch of any rank.
    """

    rank: int
    addresses: tuple[int, ...]
    """Where this rank finds the block of each, its own among them."""
    epochs: Tensor
    """(programs,) int64, this rank's alone: the number of each one's last launch, 0 at first."""
    timeout_s: float

    def __post_init__(self) -> None:
        """Raises `ValueError` for addresses that do not fit."""
        if not 2 <= len(self.addresses) <= MOST_RANKS:
            raise ValueError(f"{len(self.addresses)} ranks are not 2 to {MOST_RANKS}")
        if any(address % 16 for address in self.addresses):
            raise ValueError("blocks must be aligned to 16 bytes")
        if not 1 <= self.programs <= MOST_PROGRAMS:
            raise ValueError(f"{self.programs} programs are not 1 to {MOST_PROGRAMS}")

    @property
    def timeout_ns(self) -> int:
        """`timeout_s` as kernels take it."""
        return int(self.timeout_s * 1e9)

    @property
    def programs(self) -> int:
        """The grid of every launch, the same on all ranks."""
        return len(self.epochs)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.addresses)


@triton.jit
def signal_peers(
    addresses: tl.tuple,
    epoch: tl.tensor,
    rank: tl.tensor,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
) -> None:
    """Tell the same program of every rank that this one's rows of launch `epoch` are there: after
    a barrier of the program.
    """
    peers = tl.arange(0, PADDED_RANKS)
    inside = peers < RANKS
    blocks = tl.zeros([PADDED_RANKS], tl.int64)
    for peer in tl.static_range(RANKS):
        blocks = tl.where(peers == peer, addresses[peer], blocks)
    signals = (blocks + _FIRST_SIGNAL).to(tl.pointer_type(tl.int64))
    signals += tl.program_id(0) * _PITCH + rank
    tl.atomic_xchg(signals, epoch, mask=inside, sem="release", scope="sys")


@triton.jit
def wait_for_peers(
    own: tl.tensor,
    epoch: tl.tensor,
    timeout_ns: tl.tensor,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
) -> None:
    """Until the same program of every rank has signalled launch `epoch`."""
    peers = tl.arange(0, PADDED_RANKS)
    inside = peers < RANKS
    signals = (tl.cast(own, tl.int64) + _FIRST_SIGNAL).to(tl.pointer_type(tl.int64))
    signals += tl.program_id(0) * _PITCH + peers
    polls = 0
    began = epoch * 0
    while _lowest(signals, inside, epoch) < epoch:
        polls += 1
        if polls % _POLLS == 0:
            now = tl.extra.cuda.globaltimer()
            began = tl.where(began == 0, now, began)
            if now - began > timeout_ns:
                tl.inline_asm_elementwise(
                    "trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
                )
    tl.debug_barrier()


@triton.jit
def _lowest(signals: tl.tensor, inside: tl.tensor, epoch: tl.tensor) -> tl.tensor:
    """The least of the signals, or `epoch`: adding nothing is a load with acquire order."""
    seen = tl.atomic_add(signals, 0, mask=inside, sem="acquire", scope="sys")
    return tl.min(tl.where(inside, seen, epoch), 0)


@triton.jit
def half_of(
    address: tl.tensor, epoch: tl.tensor, dtype: tl.constexpr, HALF: tl.constexpr
) -> tl.tensor:
    """The half of the block at `address` that launch `epoch` uses."""
    block = tl.cast(address, tl.int64).to(tl.pointer_type(dtype))
    return tl.multiple_of(block, 16) + (epoch & 1) * HALF
