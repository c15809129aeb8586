"""Matrices as compressed-tensors, ModelOpt and block-scaled FP8 store them: rows are outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from splitserve.weights.arrays import (
    Floats,
    grid_of,
    groups_of,
    numbers_of,
    positions_in,
    to_floats,
    to_words,
    unpack_rows,
)
from splitserve.weights.checks import (
    FLOAT_TYPES,
    check_groups,
    check_is_no_stack,
    checked_finite,
    held_bytes,
    read_group_of_columns,
    read_vector,
)
from splitserve.weights.dense import to_tensor
from splitserve.weights.grid import covering
from splitserve.weights.quantization import PackedCodes, ScaledCodes
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight

SMOOTHING: Final = "input_smoothing"
"""Not of compressed-tensors: what the module's input is divided by, (in,) F32. See `writer`."""

_ZEROS: Final = "weight_zero_point"
_CODE_TYPES: Final = {"int8": "I8", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class ScaledMatrix:
    """See `StoredMatrix`. One byte a code."""

    source: MatrixSource
    scheme: ScaledCodes
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    input_scale: StoredTensor | None
    smoothing: StoredTensor | None

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource, scheme: ScaledCodes) -> ScaledMatrix:
        """Checks every tensor's name, type and shape."""
        check_is_no_stack(headers, source)
        module, (rows, columns) = source.module, source.shape
        high, wide = scheme.block[0] or rows, scheme.block[1] or columns
        codes = headers.find(source.name, source.shape, types=[_CODE_TYPES[scheme.kind]])
        check_groups(codes, columns, wide)
        shape = -(-rows // high), columns // wide
        shapes: list[tuple[int, ...]] = [shape]
        if shape[1] == 1:
            shapes.append(shape[:1])
        if shape == (1, 1):
            shapes.append(())
        name = f"{module}.{scheme.scale_name}"
        zeros = input_scale = None
        if not scheme.symmetric:
            zeros = headers.find(f"{module}.{_ZEROS}", *shapes, types=["I8"])
        else:
            _check_has_no_zeros(headers, module)
        if scheme.input_scale:
            input_scale = headers.find(f"{module}.input_scale", (), (1,), types=FLOAT_TYPES)
        return cls(
            source=source,
            scheme=scheme,
            codes=codes,
            scales=headers.find(name, *shapes, types=FLOAT_TYPES),
            zeros=zeros,
            input_scale=input_scale,
            smoothing=find_smoothing(headers, source),
        )

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        return held_bytes(8, self.scheme.block[1] or self.source.shape[1])

    def read(self, dtype: torch.dtype) -> Weight:
        """See `StoredMatrix.read`."""
        from splitserve.weights.coded import quantized_matrix

        source = self.source
        columns = source.columns or range(source.shape[1])
        codes = to_tensor(grid_of(self.codes).read(source.rows, [columns]), self.codes.dtype)
        zeros = None if self.zeros is None else self._grouped(self.zeros, columns)
        matrix = quantized_matrix(
            self.scheme.kind, codes, self._grouped(self.scales, columns), zeros
        )
        if self.input_scale is not None:
            matrix = replace(matrix, input_scale=_positive(self.input_scale))
        return smoothed(matrix, self.smoothing, columns, self.scheme.quantizes_input)

    def _grouped(self, stored: StoredTensor, columns: range) -> Floats:
        """Scales or zeros of the rows and groups that are taken."""
        height, width = self.source.shape
        high, wide = self.scheme.block[0] or height, self.scheme.block[1] or width
        data = grid_of(stored).read()
        values = data.view(np.int8) if stored.dtype == "I8" else to_floats(data, stored.dtype)
        values = checked_finite(values.astype(np.float32, copy=False), stored)
        values = values.reshape(-(-height // high), -1)
        _, groups = groups_of(columns, wide)
        rows = numbers_of(self.source.rows or [range(height)]) // high
        return values[np.ix_(rows, groups)]


@dataclass(frozen=True)
class PackedMatrix:
    """See `StoredMatrix`. compressed-tensors' pack-quantized, codes of 4 or 8 bits in words."""

    source: MatrixSource
    scheme: PackedCodes
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None
    shape: StoredTensor
    order: StoredTensor | None
    smoothing: StoredTensor | None

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource, scheme: PackedCodes) -> PackedMatrix:
        """Checks every tensor's name, type and shape."""
        check_is_no_stack(headers, source)
        module, (rows, columns) = source.module, source.shape
        size, per_word = scheme.group_size or columns, 32 // scheme.bits
        packed = rows, -(-columns // per_word)
        codes = headers.find(f"{module}.weight_packed", packed, types=["I32"])
        check_groups(codes, columns, size)
        groups, zeros, order = columns // size, None, None
        if f"{module}.weight_g_idx" in headers:
            order = headers.find(f"{module}.weight_g_idx", (columns,), types=["I32", "I64"])
        if not scheme.symmetric:
            shape = -(-rows // per_word), groups
            zeros = headers.find(f"{module}.{_ZEROS}", shape, types=["I32"])
        else:
            _check_has_no_zeros(headers, module)
        return cls(
            source=source,
            scheme=scheme,
            codes=codes,
            scales=headers.find(f"{module}.weight_scale", (rows, groups), types=FLOAT_TYPES),
            zeros=zeros,
            shape=headers.find(f"{module}.weight_shape", (2,), types=["I32", "I64"]),
            order=order,
            smoothing=find_smoothing(headers, source),
        )

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        return held_bytes(self.scheme.bits, self.scheme.group_size or self.source.shape[1])

    def read(self, dtype: torch.dtype) -> Weight:
        """See `StoredMatrix.read`."""
        from splitserve.weights.coded import from_groups

        source, bits = self.source, self.scheme.bits
        stated = tuple(read_vector(self.shape).tolist())
        if stated != source.shape:
            raise self.shape.error(f"holds {stated}, the model needs {source.shape}")
        size = self.scheme.group_size or source.shape[1]
        columns = source.columns or range(source.shape[1])
        scales = to_floats(grid_of(self.scales).read(source.rows), self.scales.dtype)
        checked_finite(scales, self.scales)
        zeros = np.full_like(scales, 1 << (bits - 1))
        if self.zeros is not None:
            zeros = self._read_zeros(self.zeros)
        weight = from_groups(
            bits=bits,
            codes=self._read_codes(columns),
            scales=scales,
            zeros=zeros,
            columns=columns,
            group_size=size,
            group=read_group_of_columns(self.order, size),
            dtype=dtype,
        )
        return smoothed(weight, self.smoothing, columns, self.scheme.quantizes_input)

    def _read_codes(self, columns: range) -> NDArray[np.uint8]:
        per_word = 32 // self.scheme.bits
        (words,) = covering([columns], per_word)
        packed = to_words(grid_of(self.codes).read(self.source.rows, [words]))
        skip = columns.start - words.start * per_word
        codes = unpack_rows(packed, self.scheme.bits, skip, len(columns))
        return np.ascontiguousarray(codes)

    def _read_zeros(self, stored: StoredTensor) -> Floats:
        """Packed along the outputs, for all groups."""
        bits, per_word = self.scheme.bits, 32 // self.scheme.bits
        spans = self.source.rows or [range(self.source.shape[0])]
        words = covering(spans, per_word)
        packed = np.ascontiguousarray(to_words(grid_of(stored).read(words)).T)
        codes = unpack_rows(packed, bits, 0, packed.shape[1] * per_word)
        return codes[:, positions_in(spans, words, per_word)].T.astype(np.float32)


def _check_has_no_zeros(headers: Headers, module: str) -> None:
    zeros = headers.tensors.get(f"{module}.{_ZEROS}")
    if zeros is not None:
        raise zeros.error("is stored, though the config says that its weights are symmetric: true")


def find_smoothing(headers: Headers, source: MatrixSource) -> StoredTensor | None:
    """What the input is divided by, if that is stored."""
    name = f"{source.module}.{SMOOTHING}"
    if name not in headers:
        return None
    return headers.find(name, source.shape[1:], types=FLOAT_TYPES)


def smoothed(
    weight: Weight, stored: StoredTensor | None, columns: range, quantizes_input: bool
) -> Weight:
    """The matrix with what is stored of its input's smoothing."""
    import torch

    smoothing = None
    if stored is not None:
        values = checked_finite(to_floats(grid_of(stored).read([columns]), stored.dtype), stored)
        if (values <= 0).any():
            raise stored.error("has numbers that are not positive")
        smoothing = torch.from_numpy(values.reshape(-1))
    if isinstance(weight, torch.Tensor):
        return weight if smoothing is None else (weight / smoothing).to(weight.dtype)
    return replace(weight, smoothing=smoothing, quantizes_input=quantizes_input)


def _positive(stored: StoredTensor) -> float:
    value = float(to_floats(grid_of(stored).read(), stored.dtype)[0, 0])
    if not (isfinite(value) and value > 0):
        raise stored.error(f"is {value}, expected a positive number")
    return value
