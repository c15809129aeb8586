"""What the products of few rows share: tiles, splits of the inner dimension, and tolerances.

A step of decoding multiplies few rows by every weight once, so that its time is the time of
reading the weights. The products here put the weight on the tall side of the tensor cores' tile,
which takes it from shared memory with no trip through registers, and pad the few rows to a short
side of 8 to 64. Where the weight has fewer tiles than the device has room for, the inner dimension
is split too: each program leaves fp32 sums, and the last one to arrive at a tile adds them in the
order of the splits, so that a result never depends on which one was last (the fix-up of Stream-K,
Osama et al. 2023, over equal splits). It also sets the tile's counter back to zero, so that a CUDA
graph can be replayed.

With programmatic dependent launch a program starts while the kernel before it is still running: it
asks for the first bytes of its weight to be brought into the L2 cache, and only then waits for what
the other kernel writes. Nothing is read before the wait, so weights written by that very kernel
are still seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from splitserve_kernels.fp8_rows import FP8_MAX, LEAST_PEAK

MAX_ROWS = 64
"""The most rows that count as few."""

MAX_SPLITS = 16
MAX_TILES = 1 << 14
"""How many tiles with split sums one product may have."""

TWO_A_PROCESSOR = 113 << 10
"""Bytes of shared memory that each of two programs on one multiprocessor of Hopper may have."""

LINE_BYTES = tl.constexpr(128)
"""What one prefetch brings into the L2 cache."""

_FP8_MAX, _LEAST_PEAK = tl.constexpr(FP8_MAX), tl.constexpr(LEAST_PEAK)

TOLERANCE = MappingProxyType(
    {
        torch.bfloat16: 2 * 2**-9,
        torch.float16: 2 * 2**-11,
        torch.float32: 2**-17,
    }
)
"""How far a row of a result may be from the exact one, relative in the Euclidean norm.

Products are exact and sums are fp32, so that the 16-bit types are rounded once, at the end: half a
unit in the last place, and as much again. In fp32 a product is three tf32 products.
"""


@dataclass(frozen=True)
class TilePlan:
    """How one product is cut: constants of the kernel, never the contents of a tensor.

    `block_m` pads the rows (8, 16, 32 or 64), `block_n` rows of the weight and `block_k` columns
    make a tile, `splits` programs share a tile's columns, `prefetch_lines` lines of each row of
    the weight are asked for before the wait, `tma` reads the weight by a tensor
    descriptor, and `precise_k` columns of fp8 are summed before the sum goes on in fp32.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4
    prefetch_lines: int = 0
    tma: bool = False
    precise_k: int = 0

    def options(self) -> dict[str, int]:
        """What the compiler takes beside the kernel's own constants."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def with_rows_of_16_bits(self, *, gated: bool, alone: bool) -> TilePlan:
        """This plan for codes, with as many stages as there is room for where rows come in 16 bits.

        `alone`: the only program of its multiprocessor; otherwise there are two.
        """
        room = TWO_A_PROCESSOR * (2 if alone else 1)
        weight = self.block_n * self.block_k * (2 if gated else 1)
        codes = self.block_m * self.block_k
        # Rows take one stage less than the weight, and half a stage for their codes.
        stages = (room + codes) // (weight + 2 * codes)
        if stages < 3 and self.block_k > 128:
            shorter = replace(self, block_k=self.block_k // 2, num_stages=2 * self.num_stages)
            return shorter.with_rows_of_16_bits(gated=gated, alone=alone)
        return replace(self, num_stages=min(stages, self.num_stages))


def pad_rows(rows: int, least: int = 8) -> int:
    """The short side of the tile: a power of two from `least` on."""
    return max(least, int(triton.next_power_of_2(rows)))


def fill(tiles: int, most: int, num_processors: int, *, least: float) -> int:
    """Splits, a power of two up to `most`, that make `tiles` at least `least` a processor."""
    splits = 1
    while tiles * splits < least * num_processors and 2 * splits <= min(most, MAX_SPLITS):
        splits *= 2
    return splits


def split_workspace(
    tiles: int, splits: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for the fp32 sums of `tiles` x `splits` tiles of `size` elements, and the counters.

    Both are placeholders where nothing is split. Raises `ValueError` above MAX_TILES or MAX_SPLITS.
    """
    if splits == 1:
        nothing = counters(device)
        return nothing, nothing
    if tiles > MAX_TILES or splits > MAX_SPLITS:
        raise ValueError(f"{tiles} tiles, {splits} splits: at most {MAX_TILES}, {MAX_SPLITS}")
    sums = torch.empty((splits, tiles, size), dtype=torch.float32, device=device)
    return sums, counters(device)


def counters(device: torch.device) -> Tensor:
    """One zero a tile, int32; every kernel leaves zeros behind.

    Products on one stream share them, as they run one after the other. The first call on a stream
    must come before a graph is captured there: raises `RuntimeError` otherwise.
    """
    on_gpu = device.type == "cuda"
    return _counters(device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a product once on this stream before capturing a graph of it")
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 of a CPU, where kernels are only interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def round_blocks_reference(x: Tensor, block_k: int, dtype: torch.dtype) -> Tensor:
    """(m, k) fp32: rows as they are multiplied, codes of type `dtype` times their block's step."""
    width = x.shape[1]
    blocks = functional.pad(x.float(), (0, -width % block_k)).reshape(len(x), -1, block_k)
    steps = blocks.abs().amax(2, keepdim=True).clamp_min(LEAST_PEAK) * (1 / FP8_MAX)
    codes = (blocks * (1 / steps)).to(dtype)
    return (codes.float() * steps).reshape(len(x), -1)[:, :width]


@triton.jit
def ask_for(rows: tl.tensor, LINES: tl.constexpr) -> None:
    """Have LINES lines from each of these addresses, pointers (BLOCK_N,), brought into L2."""
    if LINES > 0:
        lines = rows.to(tl.int64)[:, None] + tl.arange(0, LINES)[None, :] * LINE_BYTES
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [lines],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def split_range(
    k: tl.tensor, split: tl.tensor, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first and the end of this split's blocks of columns; lengths differ by one at most."""
    blocks = tl.cdiv(k, BLOCK_K)
    return split * blocks // SPLITS, (split + 1) * blocks // SPLITS


@triton.jit
def leave(acc: tl.tensor, sums: tl.tensor, place: tl.tensor) -> None:
    """Store one program's sums, (rows, columns) fp32, as the `place`th of that size."""
    height: tl.constexpr = acc.shape[0]
    width: tl.constexpr = acc.shape[1]
    places = tl.arange(0, height)[:, None] * width + tl.arange(0, width)[None, :]
    tl.store(sums + place.to(tl.int64) * (height * width) + places, acc)


@triton.jit
def arrive(arrived: tl.tensor, tile: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """Say that this program has left its sums; true in the last, which may read all the others'.

    The counter is zero again after the last.
    """
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(arrived + tile, 0)
    return last


@triton.jit
def collect(
    acc: tl.tensor,
    sums: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    split: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """What was left at places `first`, `first + step`, ..., added in this order.

    `acc` is what this program, the `split`th, left itself. Of two it reads the other alone: the
    order of two does not matter.
    """
    height: tl.constexpr = acc.shape[0]
    width: tl.constexpr = acc.shape[1]
    places = tl.arange(0, height)[:, None] * width + tl.arange(0, width)[None, :]
    # Not from the L1 cache, which other processors' stores do not reach.
    if SPLITS == 2:
        part = sums + (first + (1 - split) * step).to(tl.int64) * (height * width)
        total = acc + tl.load(part + places, cache_modifier=".cg")
    else:
        total = tl.zeros([height, width], tl.float32)
        for each in tl.static_range(SPLITS):
            part = sums + (first + each * step).to(tl.int64) * (height * width)
            total += tl.load(part + places, cache_modifier=".cg")
    return total


@triton.jit
def block_steps(x_tile: tl.tensor) -> tl.tensor:
    """Steps of rows (rows, columns), fp32: their largest magnitudes at the largest code."""
    peak = tl.max(tl.abs(x_tile.to(tl.float32)), 1)
    return tl.maximum(peak, _LEAST_PEAK) * (1.0 / _FP8_MAX)


@triton.jit
def block_codes(x_tile: tl.tensor, step: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """(columns, rows) codes of (rows, columns) with these steps.

    A NaN has a code, and an infinity becomes one, as its step's inverse is zero.
    """
    # A division a row: one a number costs as much again as all the rest.
    return tl.trans((x_tile.to(tl.float32) * (1.0 / step)[:, None]).to(DTYPE))


@triton.jit
def add_block(
    w_tile: tl.tensor, codes: tl.tensor, unit: tl.tensor, acc: tl.tensor, PRECISE_K: tl.constexpr
) -> tl.tensor:
    """acc + the product of a block times what one unit of it is. The block's own sum goes on in
    fp32 after PRECISE_K columns.
    """
    if PRECISE_K > 0 and w_tile.shape[1] > PRECISE_K:
        part = tl.dot(w_tile, codes, max_num_imprecise_acc=PRECISE_K)
    else:
        part = tl.dot(w_tile, codes)
    return acc + part * unit
