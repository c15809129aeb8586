"""x @ weight^T with integer codes for the weight alone, for at most 64 rows of x.

See `small_tiles` and `small_multiply_codes` for the algorithm.

Packed nibbles: byte j of pack b of a row, `group` bytes a pack, has column 2 b group + j in its low
nibble and column 2 b group + group + j in its high one. Each half of a pack is one group and one
product, and nothing is interleaved.

Steps: one int32 a group and row, (groups, n). Its upper 24 bits are those of the fp32 scale, which
holds any fp16 or bf16; the lower 8 are the zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from splitserve_kernels.small_linear import small_linear_reference
from splitserve_kernels.small_multiply_codes import multiply_codes
from splitserve_kernels.small_tiles import (
    MAX_ROWS,
    TilePlan,
    fill,
    num_processors,
    pad_rows,
)

GROUPS = (32, 64, 128)
"""Columns that may share an int4 step."""

ZERO_MASK = 0xFF
"""The bits of a step that are its zero."""


@dataclass(frozen=True)
class PackedCodes:
    """A weight (n, k) of `bits` 4 or 8.

    codes: (n, k / 2) uint8 nibbles, or (n, k) int8; steps: (groups, n) int32; see above.
    """

    codes: Tensor
    steps: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a step."""
        return self.shape[1] // self.steps.shape[0]


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> PackedCodes:
    """`(codes - zeros) * scales` for the kernel.

    codes: (n, k) int8, in -8..7 or 0..15 throughout
    scales, zeros: (n, groups), groups of 32, 64 or 128 columns, two of which divide k; zeros are
    whole numbers

    Raises `ValueError` for shapes that do not go together and for codes that are not nibbles.
    """
    n, k = codes.shape
    group = k // scales.shape[1]
    if group not in GROUPS or group * scales.shape[1] != k or k % (2 * group):
        raise ValueError(f"{k} columns in {scales.shape[1]} groups cannot be packed")
    lift = 8 if bool((codes < 0).any()) else 0
    lifted = codes.to(torch.int16) + lift
    if bool(((lifted < 0) | (lifted > 15)).any()):
        raise ValueError("these codes are not nibbles")
    halves = lifted.to(torch.uint8).view(n, -1, 2, group)
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).view(n, k // 2).contiguous()
    return PackedCodes(packed, pack_steps(scales, zeros, lift), 4)


def pack_int8(codes: Tensor, scales: Tensor) -> PackedCodes:
    """`codes * scales` for the kernel: codes (n, k) int8, scales (n, groups), k / groups a multiple
    of 64.

    Raises `ValueError` for shapes that do not go together.
    """
    n, k = codes.shape
    if scales.shape[0] != n or k % scales.shape[1] or k // scales.shape[1] % 64:
        raise ValueError(f"codes {n, k} and scales {tuple(scales.shape)} do not go together")
    return PackedCodes(codes.contiguous(), pack_steps(scales, None, 0), 8)


def pack_steps(scales: Tensor, zeros: Tensor | None, lift: int) -> Tensor:
    """(groups, n) int32 from (n, groups); `lift` is added to the zeros.

    Raises `ValueError` for zeros that are no whole numbers in 0..127 then.
    """
    bits = scales.t().float().contiguous().view(torch.int32)
    # To the nearest number of 24 bits.
    bits = (bits + 0x80) & ~ZERO_MASK
    if zeros is None:
        return bits | lift
    lifted = zeros.t().float() + lift
    if bool(((lifted < 0) | (lifted > 127) | (lifted != lifted.round())).any()):
        raise ValueError("zeros must be whole numbers in 0..127")
    return bits | lifted.to(torch.int32)


def unpack(weight: PackedCodes) -> Tensor:
    """(n, k) fp32."""
    n, k = weight.shape
    values = weight.codes
    if weight.bits == 4:
        packs = weight.codes.view(n, -1, 1, weight.group)
        values = torch.cat([packs & 15, packs >> 4], dim=2)
    scales = (weight.steps & ~ZERO_MASK).view(torch.float32).t()
    zeros = (weight.steps & ZERO_MASK).t()
    groups = values.reshape(n, -1, weight.group).float()
    return ((groups - zeros[:, :, None]) * scales[:, :, None]).view(n, k)


def small_linear_int(
    x: Tensor,
    weight: PackedCodes,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """x @ unpack(weight)^T + bias, summed in fp32 and rounded once: (m, n).

    x: (m, k), m <= MAX_ROWS, contiguous in the last dimension
    weight: from `pack_int4` or `pack_int8`
    bias: (n,) of x's type
    out: (m, n) of x's type, contiguous in the last dimension; made if None
    plan: as in `small_linear`; its `block_k` is bytes of codes

    Raises `ValueError` for shapes and types that do not go together.
    """
    n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} and weight {n, k} do not go together")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows, must have 1 to {MAX_ROWS}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"type {x.dtype} is not supported")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} does not go with {n} columns")
    if out is None:
        out = x.new_empty((x.shape[0], n))
    if out.shape != (x.shape[0], n) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not ({x.shape[0]}, {n}) of {x.dtype}")
    if plan is None:
        processors = num_processors(x.device)
        kind = {"bits": weight.bits, "group": weight.group}
        plan = choose_int(x.shape[0], n, k, **kind, num_processors=processors)
    multiply_codes(x, weight.codes, weight.steps, out, plan, bias=bias, early=early)
    return out


def small_linear_int_reference(
    x: Tensor, weight: PackedCodes, *, bias: Tensor | None = None
) -> Tensor:
    """`small_linear_int` in fp32."""
    return small_linear_reference(x, unpack(weight), bias=bias)


def choose_int(m: int, n: int, k: int, *, bits: int, group: int, num_processors: int) -> TilePlan:
    """The plan for x (m, k) and codes (n, k). The library has no such product, and its product of
    wide numbers is slower for every shape that was measured.
    """
    side = pad_rows(m, 16)
    tiles = triton.cdiv(n, 64)
    wide = tiles >= 1.4 * num_processors
    splits = fill(tiles, k // 1024, num_processors, least=1.4)
    small_steps = bits == 4 and group < 128
    if side == 16 and bits == 4 and not wide and not small_steps:
        splits = fill(triton.cdiv(n, 128), k // 512, num_processors, least=1.9)
        return TilePlan(side, 128, 128, splits, 4, 2, prefetch_lines=4)
    if side == 16:
        # Two warps a program: then nibbles go from shared memory to registers in whole words.
        stages = 5 if bits == 8 else 3 if small_steps else 2
        return TilePlan(side, 64, 128, splits, 2, stages, prefetch_lines=4)
    if small_steps:
        # Sums of 128 x 64 beside their parts do not fit in registers with wider steps.
        height = 128 if group == 32 else 64
        return TilePlan(side, height, group, 1 if wide else 4, num_stages=4, prefetch_lines=4)
    if wide and (bits == 8 or side == 32):
        return TilePlan(side, 128, 128, num_stages=3, prefetch_lines=4)
    return TilePlan(side, 64, 128, splits, num_stages=3, prefetch_lines=4)
