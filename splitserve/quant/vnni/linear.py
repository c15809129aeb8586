"""A product of codes and bf16 inputs."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.matrix import CodeKind, QuantizedMatrix
from splitserve.quant.vnni.emitter import LANES, FloatKind
from splitserve.quant.vnni.jit import compiled, omp_calls
from splitserve.quant.vnni.variant import BLOCKS, Inputs, Variant, scratch_bytes

_TILE = LANES * BLOCKS
_MOST_GROUP = 1 << 15  # sums of a group fit into 32 bits
_UNROLLED_GROUP = 32
_ALIGNMENT = 64
_FLOATS: dict[FloatKind, torch.dtype] = {
    "bfloat": torch.bfloat16,
    "half": torch.float16,
    "float": torch.float32,
}


class VnniLinear:
    """See the package. Each row of the result depends on that row alone.

    Measured on two cores for all products of a 135M model, against bf16 in oneDNN's packed layout
    (`benchmarks/quant_speed.py`), at 1, 16 and 512 rows:

    - int8 2.1 x, 1.2 x, 1.0 x; with inputs rounded to int8 2.3 x, 1.6 x, 2.0 x;
    - int4 in groups of 32 2.8 x, 1.2 x, 0.8 x;
    - fp8 1.3 x, 0.8 x, 0.4 x: its codes are widened again for every six rows.

    A call costs 3.5 us besides its product, a third of what oneDNN's costs.
    """

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None) -> None:
        """The matrix's order and smoothing are the caller's."""
        self._out, self._columns = matrix.shape
        groups = matrix.scales.shape[1]
        variant = _variant(matrix)
        product = compiled(variant)
        if product is None:
            raise RuntimeError("no code can be made for this processor")
        self._product = product
        self._width = self._out + -self._out % _TILE
        shift = _shift(matrix)
        zeros = _zeros(matrix, shift)
        self._codes = _aligned(_interleave(self._padded(_unsigned(matrix, shift)), matrix.kind))
        self._scales = _blocks(self._padded(matrix.scales.to(_FLOATS[variant.scales])))
        self._zeros = self._scales
        if zeros is not None and variant.zeros is not None:
            self._zeros = _blocks(self._padded(zeros.to(_FLOATS[variant.zeros])))
        self._bias = torch.zeros(self._width)
        if bias is not None:
            self._bias[: self._out] = bias
        group = matrix.group_size
        tensors = (self._codes, self._scales, self._zeros, self._bias)
        numbers = (*(each.data_ptr() for each in tensors), groups, group, self._width // _TILE)
        plan = struct.pack("8qf", *numbers, self._width, matrix.input_scale or 0.0)
        self._plan = torch.frombuffer(bytearray(plan), dtype=torch.uint8)
        self._plan_address = self._plan.data_ptr()
        self._scratch = scratch_bytes(variant, 1, self._columns, groups)

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        """bf16 inputs, groups of whole vectors, and code that can be made for this processor."""
        fits = matrix.group_size % LANES == 0 and 0 < matrix.group_size <= _MOST_GROUP
        plain = matrix.kind != "fp8" or (matrix.zeros is None and not matrix.quantizes_input)
        on_cpu = matrix.codes.device.type == "cpu"
        if not (on_cpu and plain and fits and dtype is torch.bfloat16):
            return False
        return omp_calls() is not None and compiled(_variant(matrix)) is not None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        rows, columns = x.shape
        if columns != self._columns or x.dtype is not torch.bfloat16:
            raise ValueError(f"inputs must be {self._columns} bf16 numbers a row, not {x.dtype}")
        x = x.contiguous()
        out = x.new_empty(rows, self._width)
        scratch = torch.empty(rows * self._scratch, dtype=torch.uint8)
        self._product(
            self._plan_address,
            x.data_ptr(),
            scratch.data_ptr(),
            out.data_ptr(),
            rows,
            torch.get_num_threads(),
        )
        return out if self._width == self._out else out[:, : self._out].contiguous()

    def _padded(self, values: Tensor) -> Tensor:
        return functional.pad(values, (0, 0, 0, self._width - self._out))


def _variant(matrix: QuantizedMatrix) -> Variant:
    zeros = _zeros(matrix, _shift(matrix))
    return Variant(
        codes=matrix.kind,
        scales=_exact_kind(matrix.scales),
        zeros=None if zeros is None else _exact_kind(zeros),
        group=matrix.group_size if matrix.group_size <= _UNROLLED_GROUP else 0,
        inputs=_inputs(matrix),
    )


def _inputs(matrix: QuantizedMatrix) -> Inputs:
    if matrix.kind == "fp8":
        return "plain"
    if not matrix.quantizes_input:
        return "wide"
    return "rows" if matrix.input_scale is None else "fixed"


def _shift(matrix: QuantizedMatrix) -> int:
    """What makes codes unsigned. int4 codes may be so already."""
    if matrix.kind == "fp8":
        return 0
    signed = matrix.kind == "int8" or int(matrix.codes.min()) < 0
    return _middle(matrix.kind) if signed else 0


def _middle(kind: CodeKind) -> int:
    """Of the unsigned codes."""
    return 8 if kind == "int4" else 128


def _unsigned(matrix: QuantizedMatrix, shift: int) -> Tensor:
    if matrix.kind == "int8":
        return matrix.codes.view(torch.uint8) ^ shift
    if matrix.kind == "fp8":
        return matrix.codes.view(torch.uint8)
    return (matrix.codes + shift).view(torch.uint8)


def _zeros(matrix: QuantizedMatrix, shift: int) -> Tensor | None:
    """The unsigned codes' zeros, None where all are the middle."""
    if matrix.zeros is not None:
        return matrix.zeros.float() + shift
    return (
        None
        if shift == _middle(matrix.kind) or matrix.kind == "fp8"
        else torch.zeros_like(matrix.scales, dtype=torch.float32)
    )


def _exact_kind(values: Tensor) -> FloatKind:
    """The smallest type that holds these numbers as they are."""
    exact = (k for k, dtype in _FLOATS.items() if torch.equal(values.to(dtype).float(), values))
    return next(exact, "float")


def _blocks(values: Tensor) -> Tensor:
    """(out, groups) as [block][group][16 rows]."""
    return values.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def _interleave(codes: Tensor, kind: CodeKind) -> Tensor:
    """(out, columns) codes in the package's order."""
    step = 2 if kind == "fp8" else 4
    steps = codes.view(codes.shape[0] // LANES, LANES, -1, step).transpose(1, 2).contiguous()
    if kind != "int4":
        return steps.view(-1)
    return (steps[:, 0::2] | (steps[:, 1::2] << 4)).view(-1)


def _aligned(values: Tensor) -> Tensor:
    """The same bytes at an address that whole vectors are loaded from."""
    room = torch.empty(values.numel() + _ALIGNMENT, dtype=torch.uint8)
    skip = -room.data_ptr() % _ALIGNMENT
    return room[skip : skip + values.numel()].copy_(values)
