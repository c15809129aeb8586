"""The kernel of products of few rows whose x becomes codes on the way, block by block.

See `small_tiles` for the algorithm and `small_linear_fp8` for the product and its reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.small_multiply import Activation, store_tile
from splitserve_kernels.small_tiles import (
    TilePlan,
    add_block,
    arrive,
    ask_for,
    block_codes,
    block_steps,
    collect,
    leave,
    split_range,
    split_workspace,
)


def multiply_blocks(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    out: Tensor,
    plan: TilePlan,
    *,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    early: bool = True,
) -> None:
    """`small_multiply.multiply` of x in 16 bits or fp32: its blocks become codes on the way.

    Raises `ValueError` for a plan with a descriptor. The caller has checked shapes and types.
    """
    if plan.tma:
        raise ValueError("rows that are not codes take no tensor descriptor of the weight")
    (m, n), k = out.shape, x.shape[1]
    early = early and launches_early(x.device)
    tiles = triton.cdiv(n, plan.block_n)
    height = plan.block_n * (2 if gate else 1)
    sums, arrived = split_workspace(tiles, plan.splits, height * plan.block_m, x.device)
    _multiply_blocks[(tiles, plan.splits)](
        x,
        weight,
        out if bias is None else bias,
        scales,
        out,
        sums,
        arrived,
        m,
        n,
        k,
        x.stride(0),
        out.stride(0),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        SPLITS=plan.splits,
        GATE=gate or "",
        HAS_BIAS=bias is not None,
        EVEN_K=k % plan.block_k == 0,
        EARLY=early,
        PREFETCH_LINES=plan.prefetch_lines,
        PRECISE_K=plan.precise_k,
        **plan.options(),
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["m", "n"])
def _multiply_blocks(
    # pointers
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    arrived: tl.tensor,
    # sizes
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    # strides, in elements
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PRECISE_K: tl.constexpr,
) -> None:
    """One tile of BLOCK_N columns of `out`, over one split of k. `n` is the columns of `out`."""
    tile, split = tl.program_id(0), tl.program_id(1)
    first, end = split_range(k, split, BLOCK_K, SPLITS)
    columns, ks = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one; what comes of them is not stored.
    kept = tl.minimum(columns, n - 1).to(tl.int64)
    weight_rows, up_rows = weight + kept * k, weight + (kept + n) * k
    if EARLY:
        ask_for(weight_rows + first * BLOCK_K, PREFETCH_LINES)
        if GATE != "":
            ask_for(up_rows + first * BLOCK_K, PREFETCH_LINES)
        wait_for_the_kernel_before()

    rows = tl.arange(0, BLOCK_M)
    live = (rows < m)[:, None]
    x_places = x + rows[:, None] * x_stride + ks[None, :]
    places, up_places = weight_rows[:, None] + ks[None, :], up_rows[:, None] + ks[None, :]
    scale = tl.load(scales + kept)[:, None]
    up_scale = tl.load(scales + n + kept)[:, None] if GATE != "" else scale
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, end):
        start = block * BLOCK_K
        inside = None if EVEN_K else (ks < k - start)[None, :]
        x_tile = tl.load(x_places + start, mask=live if EVEN_K else live & inside, other=0.0)
        # Steps change their layout before the codes do, so that no barrier follows the product.
        # Times the scale first: huge rows of small weights stay finite, as in `multiply`.
        step = block_steps(x_tile)
        unit, up_unit = step[None, :] * scale, step[None, :] * up_scale
        codes = block_codes(x_tile, step, weight.dtype.element_ty)
        w_tile = tl.load(places + start, mask=inside, other=None if EVEN_K else 0.0)
        acc = add_block(w_tile, codes, unit, acc, PRECISE_K)
        if GATE != "":
            w_tile = tl.load(up_places + start, mask=inside, other=None if EVEN_K else 0.0)
            up = add_block(w_tile, codes, up_unit, up, PRECISE_K)

    last = True
    if SPLITS > 1:
        tiles, parts = tl.num_programs(0), 1 if GATE == "" else 2
        leave(acc, sums, (split * tiles + tile) * parts)
        if GATE != "":
            leave(up, sums, (split * tiles + tile) * parts + 1)
        last = arrive(arrived, tile, SPLITS)
        if last:
            acc = collect(acc, sums, tile * parts, tiles * parts, split, SPLITS)
            if GATE != "":
                up = collect(up, sums, tile * parts + 1, tiles * parts, split, SPLITS)
    if last:
        unused = sums
        store_tile(
            acc, up, bias, unused, unused, out, m, n, out_stride, columns, GATE, HAS_BIAS, False
        )
