"""Products of e4m3 codes on NVIDIA GPUs. Imports triton: only where there is a GPU."""

from __future__ import annotations

from typing import Final

import torch
from splitserve_kernels.fp8_rows import quantize_rows_fp8
from splitserve_kernels.small_linear_fp8 import (
    CODES,
    choose_fp8,
    small_gated_linear_fp8,
    small_linear_fp8,
)
from splitserve_kernels.small_multiply import Activation
from splitserve_kernels.small_tiles import MAX_ROWS, TilePlan, num_processors
from torch import Tensor

from splitserve.quant.linear_protocol import CodedRows, Rows
from splitserve.quant.matrix import QuantizedMatrix

MOST_WHOLE_ROWS: Final = 16
"""The most rows that go into a product in 16 bits and become codes in its own launch; above, a
launch before it makes them: the largest M at which `whole` beats `coded` on `out` and `down` in
`benchmarks/kernels/linear.py --whole`.
"""


class Fp8Linear:
    """Implements `CodesLinear` on tensor cores: our kernel for few rows where it is faster, the
    library elsewhere.
    """

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous()
        self._scales = matrix.scales.view(-1).float().contiguous()
        self._bias = None if bias is None else bias.to(dtype)
        self._step = matrix.input_scale
        self._dtype = dtype
        self._plans: dict[tuple[int, bool, bool], TilePlan | None] = {}

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        """Row scales, 16 bits out, sides that are multiples of 16, and Hopper or later."""
        rows, columns = matrix.shape
        one_scale = matrix.scales.shape[1] == 1 and matrix.zeros is None
        fits = rows % 16 == 0 and columns % 16 == 0
        if matrix.kind != "fp8" or not one_scale or not fits:
            return False
        if dtype not in (torch.bfloat16, torch.float16):
            return False
        return torch.cuda.get_device_capability(matrix.codes.device) >= (9, 0)

    @property
    def takes_codes(self) -> bool:
        """Whether its input may come as codes with a step of each row's own."""
        return self._step is None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        plan = self._plan(x, gated=False) if self._takes_whole(x) else None
        if plan is None:
            return self.of_codes(CodedRows(*quantize_rows_fp8(x, step=self._step)))
        return self._by_kernel(x, None, plan)

    def of_codes(self, x: CodedRows) -> Tensor:
        """See `CodesLinear`."""
        plan = self._plan(x.codes, gated=False)
        return self._by_library(x) if plan is None else self._by_kernel(x.codes, x.steps, plan)

    def gated(self, x: Rows, activation: Activation) -> Tensor | None:
        """See `TritonLinear.gated`. None, too, for rows that have to be codes before."""
        if self._bias is not None or (isinstance(x, Tensor) and not self._takes_whole(x)):
            return None
        rows, steps = (x, None) if isinstance(x, Tensor) else (x.codes, x.steps)
        plan = self._plan(rows, gated=True)
        if plan is None:
            return None
        return small_gated_linear_fp8(
            rows,
            steps,
            self._codes,
            self._scales,
            activation,
            out_dtype=self._dtype,
            plan=plan,
        )

    def _takes_whole(self, x: Tensor) -> bool:
        """A step that is fixed is for the whole input, not for a block."""
        return x.shape[0] <= MOST_WHOLE_ROWS and self._step is None

    def _by_kernel(self, x: Tensor, steps: Tensor | None, plan: TilePlan) -> Tensor:
        return small_linear_fp8(
            x,
            steps,
            self._codes,
            self._scales,
            bias=self._bias,
            out_dtype=self._dtype,
            plan=plan,
        )

    def _by_library(self, x: CodedRows) -> Tensor:
        # The library gives bf16 alone where each row has its scale.
        bias = None if self._bias is None else self._bias.to(torch.bfloat16)
        out: Tensor = torch._scaled_mm(
            x.codes,
            self._codes.t(),
            x.steps,
            self._scales.view(1, -1),
            bias=bias,
            out_dtype=torch.bfloat16,
        )
        return out.to(self._dtype)

    def _plan(self, x: Tensor, *, gated: bool) -> TilePlan | None:
        rows, coded = x.shape[0], x.dtype is CODES
        if rows > MAX_ROWS:
            return None
        key = (rows, gated, coded)
        if key not in self._plans:
            processors = num_processors(self._codes.device)
            self._plans[key] = choose_fp8(
                rows, *self._codes.shape, num_processors=processors, gated=gated, coded=coded
            )
        return self._plans[key]
