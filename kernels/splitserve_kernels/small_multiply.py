"""The kernel of products of few rows: weights on the tall side, splits, scales, gates.

See `small_tiles` for the algorithm; `small_linear` and `small_linear_fp8` for the products, their
references and their measured plans.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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

Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu"]


def multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    plan: TilePlan,
    *,
    bias: Tensor | None = None,
    steps: Tensor | None = None,
    scales: Tensor | None = None,
    gate: Activation | None = None,
    early: bool = True,
) -> None:
    """Write x @ weight^T, scaled, biased, gated, added to, into `out`, in this order.

    x: (m, k), weight: (n, k) contiguous and of a like type, out: (m, n), or (m, n / 2) with `gate`
    bias: (n,); not with `gate`
    steps, scales: (m,) and (n,) fp32, both or none: what one unit of x's rows and weight's rows is
    The rest as in `small_linear`. The caller has checked shapes and types.
    """
    (m, n), k = out.shape, x.shape[1]
    early = early and launches_early(x.device)
    tiles = triton.cdiv(n, plan.block_n)
    height = plan.block_n * (2 if gate else 1)
    sums, arrived = split_workspace(tiles, plan.splits, height * plan.block_m, x.device)
    source: Tensor | TensorDescriptor = weight
    if plan.tma:
        source = TensorDescriptor.from_tensor(weight, [plan.block_n, plan.block_k])
    _multiply[(tiles, plan.splits)](
        x,
        source,
        weight,
        out if bias is None else bias,
        sums if steps is None else steps,
        sums if scales is None else scales,
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
        SCALED=steps is not None,
        EVEN_N=n % plan.block_n == 0,
        EVEN_K=k % plan.block_k == 0,
        TMA=plan.tma,
        EARLY=early,
        PREFETCH_LINES=plan.prefetch_lines,
        PRECISE_K=plan.precise_k,
        **plan.options(),
        launch_pdl=early,
    )


@triton.jit(do_not_specialize=["m", "n"])
def _multiply(
    # pointers
    x: tl.tensor,
    weight: tl.tensor,
    weight_start: tl.tensor,
    bias: tl.tensor,
    steps: tl.tensor,
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
    SCALED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PRECISE_K: tl.constexpr,
) -> None:
    """One tile of BLOCK_N columns of `out`, over one split of k. `n` is the columns of `out`."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    first, end = split_range(k, split, BLOCK_K, SPLITS)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one; what comes of them is not stored.
    weight_rows = columns if EVEN_N else tl.minimum(columns, n - 1)
    weight_rows = weight_start + weight_rows.to(tl.int64) * k
    if EARLY:
        ask_for(weight_rows + first * BLOCK_K, PREFETCH_LINES)
        if GATE != "":
            ask_for(weight_rows + n.to(tl.int64) * k + first * BLOCK_K, PREFETCH_LINES)
        wait_for_the_kernel_before()

    # Rows of x past the end cost no read. (The last one repeated is read by all at once: slow.)
    live = (rows < m)[:, None]
    x_places = x + rows[:, None] * x_stride + ks[None, :]
    places = weight_rows[:, None] + ks[None, :]
    up_places = places + n.to(tl.int64) * k
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, end):
        start = block * BLOCK_K
        if EVEN_K:
            x_tile = tl.load(x_places + start, mask=live, other=0.0)
        else:
            x_tile = tl.load(x_places + start, mask=live & (ks < k - start)[None, :], other=0.0)
        x_tile = tl.trans(x_tile)
        if TMA:
            w_tile = weight.load([tile * BLOCK_N, start])
        elif EVEN_K:
            w_tile = tl.load(places + start)
        else:
            w_tile = tl.load(places + start, mask=ks[None, :] < k - start, other=0.0)
        acc = _add_product(w_tile, x_tile, acc, PRECISE_K)
        if GATE != "":
            if TMA:
                w_tile = weight.load([n + tile * BLOCK_N, start])
            elif EVEN_K:
                w_tile = tl.load(up_places + start)
            else:
                w_tile = tl.load(up_places + start, mask=ks[None, :] < k - start, other=0.0)
            up = _add_product(w_tile, x_tile, up, PRECISE_K)

    if SPLITS == 1:
        store_tile(
            acc,
            up,
            bias,
            steps,
            scales,
            out,
            m,
            n,
            out_stride,
            columns,
            GATE,
            HAS_BIAS,
            SCALED,
        )
    else:
        parts: tl.constexpr = 1 if GATE == "" else 2
        place = (split * tiles + tile) * parts
        leave(acc, sums, place)
        if GATE != "":
            leave(up, sums, place + 1)
        if arrive(arrived, tile, SPLITS):
            place, step = tile * parts, tiles * parts
            acc = collect(acc, sums, place, step, split, SPLITS)
            if GATE != "":
                up = collect(up, sums, place + 1, step, split, SPLITS)
            store_tile(
                acc,
                up,
                bias,
                steps,
                scales,
                out,
                m,
                n,
                out_stride,
                columns,
                GATE,
                HAS_BIAS,
                SCALED,
            )


@triton.jit
def _add_product(
    w_tile: tl.tensor, x_tile: tl.tensor, acc: tl.tensor, PRECISE_K: tl.constexpr
) -> tl.tensor:
    """acc + w_tile x_tile. Hopper's fp8 sums keep 14 bits or so: after PRECISE_K of them, on to
    fp32.
    """
    if PRECISE_K > 0:
        acc = tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=PRECISE_K)
    else:
        acc = tl.dot(w_tile, x_tile, acc, input_precision="tf32x3")
    return acc


@triton.jit
def store_tile(
    acc: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    steps: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    out_stride: tl.tensor,
    columns: tl.tensor,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """Scale, bias, gate and round sums (columns, rows); each goes to [row, column]."""
    rows = tl.arange(0, acc.shape[1])
    if SCALED:
        row_steps = tl.load(steps + rows, mask=rows < m, other=0.0)[None, :]
        acc *= row_steps * tl.load(scales + columns, mask=columns < n, other=0.0)[:, None]
        if GATE != "":
            up *= row_steps * tl.load(scales + n + columns, mask=columns < n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    if GATE != "":
        acc = activate(acc, GATE) * up
    places = out + rows[None, :] * out_stride + columns[:, None]
    mask = (rows < m)[None, :] & (columns < n)[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activate(values: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """silu, gelu or gelu_tanh of fp32."""
    if ACTIVATION == "silu":
        result = values * tl.sigmoid(values)
    elif ACTIVATION == "gelu":
        result = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # tanh(y) = 2 sigmoid(2 y) - 1
        inner = values * (1.0 + 0.044715 * values * values)
        result = values * tl.sigmoid(1.5957691216057308 * inner)
    return result
