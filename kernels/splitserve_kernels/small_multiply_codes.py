"""The kernel of products of few rows with integer codes for the weight.

See `small_tiles` for the algorithm and `small_linear_int` for how codes and steps are packed. Codes
become numbers of x's type in registers, exactly: a nibble is put below the bits of 128 (bf16) or
1024 (fp16), as in Kim et al. 2022, "Who says elephants can't run". Less its zero it is still an
exact integer, so that a group's sum is a sum of exact products; its step is applied to the sum, in
fp32.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.small_tiles import (
    TilePlan,
    arrive,
    ask_for,
    collect,
    leave,
    split_range,
    split_workspace,
)

STEP_BITS, ZERO_BITS = tl.constexpr(-256), tl.constexpr(255)
"""Which bits of a step are the scale's and which the zero's."""

_SPREAD = """{
    .reg .b32 a, b;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 $0, a, 0x000f000f, BASE, 0xea;
    lop3.b32 $1, b, 0x000f000f, BASE, 0xea;
    shr.u32 a, a, 4;
    shr.u32 b, b, 4;
    lop3.b32 $2, a, 0x000f000f, BASE, 0xea;
    lop3.b32 $3, b, 0x000f000f, BASE, 0xea;
}"""
"""Two bytes at a time become the low bits of two numbers of 16 bits."""

_TO_BF16 = tl.constexpr(_SPREAD.replace("BASE", "0x43004300"))
_TO_FP16 = tl.constexpr(_SPREAD.replace("BASE", "0x64006400"))


def multiply_codes(
    x: Tensor,
    codes: Tensor,
    steps: Tensor,
    out: Tensor,
    plan: TilePlan,
    *,
    bias: Tensor | None = None,
    early: bool = True,
) -> None:
    """Write x @ weight^T + bias into `out`.

    x: (m, k); codes: (n, k / 2) uint8 nibbles or (n, k) int8; steps: (groups, n) int32; out: (m, n)
    bias: (n,)
    The rest as in `small_linear_int`. The caller has checked shapes and types.
    """
    (m, n), k = out.shape, x.shape[1]
    bits, group = 8 * codes.shape[1] // k, k // steps.shape[0]
    early = early and launches_early(x.device)
    tiles = triton.cdiv(n, plan.block_n)
    # A step of the loop divides a row's bytes: whole packs of nibbles, or a part of a group.
    if bits == 4:
        block_k = group
        packs = gcd(k // (2 * block_k), max(1, plan.block_k // block_k))
    else:
        block_k, packs = gcd(group, plan.block_k), 1
    sums, arrived = split_workspace(tiles, plan.splits, plan.block_n * plan.block_m, x.device)
    _multiply_codes[(tiles, plan.splits)](
        x,
        codes,
        steps,
        out if bias is None else bias,
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
        BLOCK_K=block_k,
        PACKS=packs,
        GROUP=group,
        ONE_GROUP=steps.shape[0] == 1,
        BITS=bits,
        SPLITS=plan.splits,
        HAS_BIAS=bias is not None,
        EARLY=early,
        PREFETCH_LINES=plan.prefetch_lines,
        BY_HAND=x.device.type == "cuda" and x.dtype is not torch.float32,
        **plan.options(),
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["m"])
def _multiply_codes(
    # pointers
    x: tl.tensor,
    codes: tl.tensor,
    steps: tl.tensor,
    bias: tl.tensor,
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
    PACKS: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    BY_HAND: tl.constexpr,
) -> None:
    """One tile of BLOCK_N columns of `out`, over one split of k.

    A step of the loop is PACKS times BLOCK_K bytes of codes: whole packs of nibbles, whole or parts
    of groups of bytes.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row_bytes = k * BITS // 8
    first, end = split_range(row_bytes, split, BLOCK_K * PACKS, SPLITS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one; what comes of them is not stored.
    kept = tl.minimum(columns, n - 1)
    code_rows = codes + kept.to(tl.int64) * row_bytes
    if EARLY:
        ask_for(code_rows + first * (BLOCK_K * PACKS), PREFETCH_LINES)
        wait_for_the_kernel_before()

    rows, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    live = (rows < m)[:, None]
    x_places = x + rows[:, None] * x_stride + ks[None, :]
    places = code_rows[:, None] + ks[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, end):
        for pack in tl.static_range(PACKS):
            start = (block * PACKS + pack) * BLOCK_K
            tile_codes = tl.load(places + start)
            if BITS == 8:
                x_tile = tl.trans(tl.load(x_places + start, mask=live, other=0.0))
                numbers = tile_codes.to(x.dtype.element_ty)
                if ONE_GROUP:
                    acc = tl.dot(numbers, x_tile, acc, input_precision="tf32x3")
                else:
                    step = tl.load(steps + start // GROUP * n + kept)
                    part = tl.dot(numbers, x_tile, input_precision="tf32x3")
                    acc += part * _scales(step)[:, None]
            else:
                step = tl.load(steps + 2 * (start // GROUP) * n + kept)
                high_step = tl.load(steps + (2 * (start // GROUP) + 1) * n + kept)
                x_low = tl.trans(tl.load(x_places + 2 * start, mask=live, other=0.0))
                x_high = tl.trans(tl.load(x_places + 2 * start + GROUP, mask=live, other=0.0))
                low, high = _nibbles(tile_codes, x.dtype.element_ty, BY_HAND)
                low -= _zeros(step, x.dtype.element_ty, BY_HAND)[:, None]
                high -= _zeros(high_step, x.dtype.element_ty, BY_HAND)[:, None]
                part = tl.dot(low, x_low, input_precision="tf32x3")
                acc += part * _scales(step)[:, None]
                part = tl.dot(high, x_high, input_precision="tf32x3")
                acc += part * _scales(high_step)[:, None]

    if SPLITS == 1:
        _store_codes(acc, steps, bias, out, m, n, out_stride, columns, ONE_GROUP, HAS_BIAS)
    else:
        tiles = tl.num_programs(0)
        leave(acc, sums, split * tiles + tile)
        if arrive(arrived, tile, SPLITS):
            acc = collect(acc, sums, tile, tiles, split, SPLITS)
            _store_codes(acc, steps, bias, out, m, n, out_stride, columns, ONE_GROUP, HAS_BIAS)


@triton.jit
def _nibbles(
    codes: tl.tensor, DTYPE: tl.constexpr, BY_HAND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high nibble of each byte, above the base that `_zeros` has too."""
    if BY_HAND and tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _TO_BF16,
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif BY_HAND:
        low, high = tl.inline_asm_elementwise(
            _TO_FP16,
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = (codes & 15).to(DTYPE), (codes >> 4).to(DTYPE)
    return low, high


@triton.jit
def _scales(steps: tl.tensor) -> tl.tensor:
    """The scales of packed steps."""
    return (steps & STEP_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _zeros(steps: tl.tensor, DTYPE: tl.constexpr, BY_HAND: tl.constexpr) -> tl.tensor:
    """The zeros of packed steps, above the base of `_nibbles`."""
    zeros = (steps & ZERO_BITS).to(tl.float32)
    if BY_HAND:
        zeros += 128.0 if tl.bfloat16 == DTYPE else 1024.0
    return zeros.to(DTYPE)


@triton.jit
def _store_codes(
    acc: tl.tensor,
    steps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    out_stride: tl.tensor,
    columns: tl.tensor,
    ONE_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Scale if that is left to do, bias and round sums (columns, rows)."""
    if ONE_GROUP:
        step = tl.load(steps + columns, mask=columns < n, other=0)
        acc *= _scales(step)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    rows = tl.arange(0, acc.shape[1])
    places = out + rows[None, :] * out_stride + columns[:, None]
    mask = (rows < m)[None, :] & (columns < n)[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=mask)
