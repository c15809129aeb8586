"""The sum of all ranks' rows, alone or with the residual's sum and the norm, in one launch.

The one-shot all-reduce for small messages, as in TensorRT-LLM's and vLLM's custom all-reduce and in
torch's `one_shot_all_reduce`, over `peer_memory`. Each program has the same rows on every rank:

1. It copies its rows of `x` into its rank's block, signals to all ranks, and waits for theirs.
2. It reads its rows of all ranks, in the order of ranks, and adds them up in fp32: all ranks get
   the same bits, and a row's do not depend on the rows beside it. The sum is rounded to the type
   of `x` before a residual meets it, as between a sum and a norm that are launched one after the
   other.

On the CPU, in Triton's interpreter, programs run one after another and nobody waits: the caller has
to see to it that the others' rows are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.fp8_rows import check_rows, row_tile, row_warps
from splitserve_kernels.norm import NormKind, add_norm_reference, norm_row
from splitserve_kernels.peer_memory import (
    MOST_BYTES,
    PeerMemory,
    half_of,
    signal_peers,
    wait_for_peers,
)

MOST_WIDTH: Final = 8192
"""The widest row with a norm: eight elements a thread, so that all ranks' loads are under way
together and nothing spills."""

_TILE_BYTES = 4096
_TILE_WARPS = 8
"""16 bytes a thread."""


def takes(x: Tensor) -> bool:
    """Whether `all_reduce` can sum such a message; alike on all ranks, as its shape is."""
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and x.is_contiguous() and 0 < x.nbytes <= MOST_BYTES


def takes_rows(x: Tensor) -> bool:
    """The same for `all_reduce_add_norm`."""
    return takes(x) and x.ndim == 2 and x.shape[1] <= MOST_WIDTH


def all_reduce(x: Tensor, peers: PeerMemory) -> Tensor:
    """The sum of all ranks' `x`, in new memory, of its shape and type.

    x: contiguous, of any shape, a 16-bit type or fp32, at most `MOST_BYTES`

    Raises `ValueError` for what it cannot sum.
    """
    if not takes(x):
        raise ValueError(f"{tuple(x.shape)} by {x.stride()} in {x.dtype} cannot be summed")
    total = torch.empty_like(x)
    tile = _TILE_BYTES // x.element_size()
    _all_reduce[(peers.programs,)](
        x,
        None,
        None,
        None,
        total,
        None,
        peers.epochs,
        peers.addresses,
        peers.addresses[peers.rank],
        0.0,
        peers.timeout_ns,
        0,
        x.numel(),
        peers.rank,
        WIDTH=tile,
        LAYER=False,
        WIDE=False,
        TILE=tile,
        num_warps=_TILE_WARPS,
        **_constants(x, peers),
    )
    return total


def all_reduce_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    peers: PeerMemory,
    *,
    kind: NormKind,
    wide_weight: bool,
) -> tuple[Tensor, Tensor]:
    """residual + the sum of all ranks' `x`, and its norm: both (rows, width), the type of `x`, in
    new memory. As from `all_reduce`, then `norm.add_norm`: the sum has the same bits, the norm may
    differ by a rounding, as its fp32 sums go over more threads.

    x: (rows, width), as in `all_reduce`, no wider than `MOST_WIDTH`
    residual: like `x`, contiguous in the last dimension; the same on all ranks
    weight, bias, wide_weight: see `norm.add_norm`

    Raises `ValueError` for shapes and types that do not go together.
    """
    _check(x, residual, weight, bias, kind)
    total, out = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1]
    tile = row_tile(width)
    _all_reduce[(peers.programs,)](
        x,
        residual,
        weight,
        bias,
        total,
        out,
        peers.epochs,
        peers.addresses,
        peers.addresses[peers.rank],
        eps,
        peers.timeout_ns,
        residual.stride(0),
        x.numel(),
        peers.rank,
        WIDTH=width,
        LAYER=kind == "layer",
        WIDE=wide_weight,
        TILE=tile,
        num_warps=2 * row_warps(tile),
        **_constants(x, peers),
    )
    return total, out


def all_reduce_reference(parts: Sequence[Tensor]) -> Tensor:
    """`all_reduce` in plain torch, of all ranks' `x` in their order."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_add_norm_reference(
    parts: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
) -> tuple[Tensor, Tensor]:
    """`all_reduce_add_norm` in plain torch, of all ranks' `x` in their order."""
    total = all_reduce_reference(parts)
    return add_norm_reference(
        residual, total, weight, bias, eps, kind=kind, wide_weight=wide_weight
    )


def _constants(x: Tensor, peers: PeerMemory) -> dict[str, Any]:
    early = launches_early(x.device)
    return {
        "PROGRAMS": peers.programs,
        "RANKS": peers.ranks,
        "PADDED_RANKS": int(triton.next_power_of_2(peers.ranks)),
        "HALF": MOST_BYTES // x.element_size(),
        "WAITS": x.device.type != "cpu",
        "num_stages": 1,
        "EARLY": early,
        "launch_pdl": early,
    }


def _check(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind
) -> None:
    check_rows(residual)
    if not takes_rows(x):
        raise ValueError(f"{tuple(x.shape)} by {x.stride()} in {x.dtype} cannot be summed")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual {tuple(residual.shape)} is not like x {tuple(x.shape)}")
    shape = x.shape[1:]
    if any(t is not None and (t.shape != shape or not t.is_contiguous()) for t in (weight, bias)):
        raise ValueError(f"weight and bias must be contiguous and of shape {tuple(shape)}")
    if kind == "rms" and (weight is None or bias is not None):
        raise ValueError("an RMS norm has a weight and no bias")


@triton.jit(do_not_specialize=["timeout_ns", "rank"])
def _all_reduce(
    # pointers; residual and out are None for a sum alone, weight and bias may be
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    epochs: tl.tensor,
    # addresses of blocks: all ranks', and this one's
    addresses: tl.tuple,
    own: tl.tensor,
    # numbers
    eps: tl.tensor,
    timeout_ns: tl.tensor,
    # strides, in elements
    residual_stride: tl.tensor,
    # sizes
    size: tl.tensor,
    rank: tl.tensor,
    # constants
    PROGRAMS: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    WAITS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Every `PROGRAMS`th row of `WIDTH` elements, the last of fewer where there is no norm."""
    if EARLY:
        wait_for_the_kernel_before()
    program = tl.program_id(0)
    rows = tl.cdiv(size, WIDTH)
    columns = tl.arange(0, TILE)
    dtype: tl.constexpr = x.dtype.element_ty
    epoch = tl.load(epochs + program) + 1
    mine = half_of(own, epoch, dtype, HALF)
    for row in range(program, rows, PROGRAMS):
        places = row * WIDTH + columns
        inside = (columns < WIDTH) & (places < size)
        tl.store(mine + places, tl.load(x + places, mask=inside, other=0.0), mask=inside)
    # All threads have stored their rows before the signal, and read the number before one of them
    # writes the next.
    tl.debug_barrier()
    tl.store(epochs + program, epoch)
    if WAITS and program < rows:
        signal_peers(addresses, epoch, rank, RANKS, PADDED_RANKS)
        wait_for_peers(own, epoch, timeout_ns, RANKS, PADDED_RANKS)
    for row in range(program, rows, PROGRAMS):
        places = row * WIDTH + columns
        inside = (columns < WIDTH) & (places < size)
        wide = tl.zeros([TILE], tl.float32)
        for peer in tl.static_range(RANKS):
            theirs = half_of(addresses[peer], epoch, dtype, HALF)
            part = tl.load(theirs + places, mask=inside, other=0.0).to(tl.float32)
            if peer == 0:
                wide = part
            else:
                wide += part
        rounded = wide.to(dtype)
        if residual is not None:
            before = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
            rounded = (before.to(tl.float32) + rounded.to(tl.float32)).to(dtype)
        tl.store(total + places, rounded, mask=inside)
        if out is not None:
            normed = norm_row(
                rounded.to(tl.float32), weight, bias, eps, dtype, WIDTH, LAYER, WIDE, TILE
            )
            tl.store(out + places, normed, mask=inside)
