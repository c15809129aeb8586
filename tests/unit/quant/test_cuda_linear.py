"""Products of codes on a GPU against the widened weight."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", [(96, 64), (7, 33), (4096, 1024)])
@pytest.mark.parametrize("kind", ["int8", "int8-int8", "int8-fixed", "int4", "fp8", "fp8-fixed"])
def test_a_product_is_that_of_the_widened_weight(kind: str, shape: tuple[int, int]) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    matrix: QuantizedMatrix
    if kind.startswith("int8"):
        matrix = replace(quantize_int8(weight), quantizes_input=kind != "int8")
    elif kind.startswith("fp8"):
        matrix = replace(quantize_fp8(weight), quantizes_input=True)
    else:
        matrix = quantize_int4(weight, 32 if shape[1] % 32 == 0 else shape[1])
    if kind.endswith("fixed"):
        matrix = replace(matrix, input_scale=6.0 / (127 if kind.startswith("int8") else 448))
    bias = torch.randn(shape[0], generator=generator)
    product = make_quantized_linear(matrix, bias, torch.bfloat16, torch.device("cuda"))
    wide = matrix.dequantize(torch.float32)
    for rows in (1, 3, 16, 17, 40, 512):
        x = torch.randn(rows, shape[1], generator=generator).bfloat16()
        wanted = x.float() @ wide.T + bias
        out = product(x.cuda())
        assert out.dtype is torch.bfloat16
        # Each e4m3 input is off by a sixteenth at most, int8 ones by less of the largest.
        rounding = x.float().abs() @ wide.abs().T / 16 if kind.startswith("fp8") else 0.0
        most = (5e-2 if "-" in kind else 2e-2) * wanted.abs().max()
        assert ((out.float().cpu() - wanted).abs() <= most + rounding).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_rows_are_those_rounded_by_block(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitserve_kernels.small_linear_fp8 import choose_fp8, small_linear_fp8_reference
    from splitserve_kernels.small_tiles import TOLERANCE, num_processors

    from splitserve.quant import fp8_linear

    monkeypatch.setattr(fp8_linear, "MOST_WHOLE_ROWS", 64)
    device, (n, k) = torch.device("cuda"), (4096, 1024)
    matrix = replace(quantize_fp8(torch.randn(n, k) / 32), quantizes_input=True)
    bias = torch.randn(n).to(dtype)
    product = make_quantized_linear(matrix, bias, dtype, device)
    for rows in (1, 3, 16, 17, 64):
        x = (torch.randn(rows, k) * torch.logspace(-3, 2, k)).to(dtype).to(device)
        x[0, ::3] = 0
        plan = choose_fp8(rows, n, k, num_processors=num_processors(device), coded=False)
        assert plan
        exact = small_linear_fp8_reference(
            x,
            None,
            matrix.codes.to(device),
            matrix.scales.to(device),
            bias=bias.to(device),
            block_k=plan.block_k,
        )
        error = (product(x).float() - exact).norm(dim=1) / exact.norm(dim=1)
        # Sums of fp8 have some 14 bits on the way, fewer than fp16's tolerance asks for.
        assert error.max() <= TOLERANCE[torch.bfloat16]
