"""Each row of x times the weight of its expert: the products of a mixture of experts.

Rows come sorted by expert, with the offsets of each expert's rows on the device. How many tiles of
rows an expert has is known there alone, so the launch has as many programs as any offsets could
need, each finds its expert from the running sum of tiles (as in MegaBlocks, Gale et al. 2022), and
those left over return at once: no shape follows the routing, and a CUDA graph holds for any. The
weight is on the tall side of the tensor cores' tile as in `small_tiles`, so that a few rows an
expert, as decoding has, cost little more than reading the weights that are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.small_tiles import (
    TOLERANCE,
    TilePlan,
)

MAX_EXPERTS = 1024


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    expert_offsets: Tensor,
    *,
    out: Tensor | None = None,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """x[i] @ weights[e]^T for each row i of each expert e, summed in fp32, rounded once: (rows, n).

    x: (rows, k), sorted by expert, contiguous in the last dimension
    weights: (experts, n, k) of the same type, contiguous
    expert_offsets: (experts + 1,) int32 or int64, rising; expert e has rows offsets[e] to
    offsets[e + 1]. Rows from the last offset on are neither read nor written
    out: (rows, n) of the same type, contiguous in the last dimension; made if None
    plan: measured choice if None
    early: use programmatic dependent launch where the device has it

    Raises `ValueError` for shapes and types that do not go together.
    """
    _check(x, weights, expert_offsets)
    (rows, k), (experts, n, _) = x.shape, weights.shape
    if out is None:
        out = x.new_empty((rows, n))
    if out.shape != (rows, n) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not ({rows}, {n}) of {x.dtype}")
    if rows == 0:
        return out
    plan = plan or any_plan(rows, experts, x.dtype)
    early = early and launches_early(x.device)
    # Each expert's last tile may be all but empty; an expert with no row has no tile.
    row_tiles = rows // plan.block_m + min(experts, rows)
    _multiply_grouped[(row_tiles, triton.cdiv(n, plan.block_n))](
        x,
        weights,
        expert_offsets,
        out,
        experts,
        n,
        k,
        x.stride(0),
        out.stride(0),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        TILE_EXPERTS=int(triton.next_power_of_2(experts)),
        EVEN_N=n % plan.block_n == 0,
        EVEN_K=k % plan.block_k == 0,
        EARLY=early,
        **plan.options(),
        launch_pdl=early,
    )
    return out


def grouped_linear_reference(x: Tensor, weights: Tensor, expert_offsets: Tensor) -> Tensor:
    """The same in plain torch, an expert at a time: (rows, n) fp32, zero past the last offset."""
    out = torch.zeros((x.shape[0], weights.shape[1]), dtype=torch.float32, device=x.device)
    bounds = expert_offsets.tolist()
    for weight, first, end in zip(weights, bounds, bounds[1:], strict=False):
        out[first:end] = x[first:end].float() @ weight.float().t()
    return out


def any_plan(rows: int, experts: int, dtype: torch.dtype) -> TilePlan:
    """What computes any shape, as well as this kernel can."""
    if dtype is torch.float32:
        return TilePlan(16, 64, 32, num_stages=3)
    share = -(-rows // experts)
    if share > 64:
        return TilePlan(128, 256, 64, num_warps=8, num_stages=3)
    if share > 16:
        return TilePlan(64, 128, 64, num_warps=4, num_stages=4)
    return TilePlan(16, 64, 128, num_stages=4)


def _check(x: Tensor, weights: Tensor, offsets: Tensor) -> None:
    if x.dim() != 2 or weights.dim() != 3 or x.shape[1] != weights.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} and weights {tuple(weights.shape)} do not go together"
        )
    if offsets.shape != (weights.shape[0] + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{tuple(offsets.shape)} {offsets.dtype} offsets do not fit {weights.shape[0]} experts"
        )
    if weights.shape[0] > MAX_EXPERTS:
        raise ValueError(f"{weights.shape[0]} experts are more than {MAX_EXPERTS}")
    if x.dtype != weights.dtype or x.dtype not in TOLERANCE:
        raise ValueError(f"types {x.dtype} and {weights.dtype} are not supported")
    if x.stride(1) != 1 or not weights.is_contiguous() or not offsets.is_contiguous():
        raise ValueError("weights, offsets and the last dimension of x must be contiguous")


@triton.jit(do_not_specialize=["experts", "n"])
def _multiply_grouped(
    # pointers
    x: tl.tensor,
    weights: tl.tensor,
    expert_offsets: tl.tensor,
    out: tl.tensor,
    # sizes
    experts: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    # strides, in elements
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One tile of BLOCK_M rows of one expert and BLOCK_N columns."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if EARLY:
        wait_for_the_kernel_before()

    expert, first, end = _find_expert(expert_offsets, experts, row_tile, BLOCK_M, TILE_EXPERTS)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        ks = tl.arange(0, BLOCK_K)
        live = (rows < end)[:, None]
        x_places = x + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
        kept = columns if EVEN_N else tl.minimum(columns, n - 1)
        weight = weights + expert.to(tl.int64) * n * k
        places = weight + kept.to(tl.int64)[:, None] * k + ks[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, k, BLOCK_K):
            if EVEN_K:
                x_tile = tl.load(x_places + start, mask=live, other=0.0)
                w_tile = tl.load(places + start)
            else:
                inside = ks[None, :] < k - start
                x_tile = tl.load(x_places + start, mask=live & inside, other=0.0)
                w_tile = tl.load(places + start, mask=inside, other=0.0)
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="tf32x3")
        out_places = out + rows.to(tl.int64)[None, :] * out_stride + columns[:, None]
        mask = (rows < end)[None, :] & (columns < n)[:, None]
        tl.store(out_places, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _find_expert(
    expert_offsets: tl.tensor,
    experts: tl.tensor,
    row_tile: tl.tensor,
    BLOCK_M: tl.constexpr,
    TILE_EXPERTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Whose the `row_tile`th tile is, its first row and the expert's end; no rows if past all."""
    each = tl.arange(0, TILE_EXPERTS)
    begins = tl.load(expert_offsets + each, mask=each < experts, other=0).to(tl.int32)
    ends = tl.load(expert_offsets + each + 1, mask=each < experts, other=0).to(tl.int32)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, 0)
    own = (after > row_tile) & (after - tiles <= row_tile)
    expert = tl.sum(tl.where(own, each, 0), 0)
    first = tl.sum(tl.where(own, begins + (row_tile - after + tiles) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(own, ends, 0), 0)
    return expert, first, end
