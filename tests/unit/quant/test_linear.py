"""Every product of codes against the widened weight."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.matrix import CodeKind, QuantizedMatrix
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8

CPU = torch.device("cpu")
SHAPES = [(7, 33), (24, 64), (80, 576), (130, 96)]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def made(kind: CodeKind, shape: tuple[int, int], generator: torch.Generator) -> QuantizedMatrix:
    weight = torch.randn(shape, generator=generator)
    if kind == "int8":
        return quantize_int8(weight)
    if kind == "fp8":
        return quantize_fp8(weight)
    return quantize_int4(weight, 32 if shape[1] % 32 == 0 else shape[1])


def assert_product(
    matrix: QuantizedMatrix,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    rows: tuple[int, ...] = (1, 3, 5, 16, 40),
    tolerance: float | None = None,
) -> None:
    product = make_quantized_linear(matrix, bias, dtype, CPU)
    weight = matrix.dequantize(torch.float32)
    # bf16 keeps 8 bits of an input, a scale and a result; fp32 sums differ in their order only.
    most = tolerance or (2e-2 if dtype is torch.bfloat16 else 1e-5)
    for count in rows:
        x = torch.randn(count, matrix.shape[1], generator=generator).to(dtype)
        out = product(x)
        wanted = x.float() @ weight.T
        if bias is not None:
            wanted += bias
        assert out.dtype is dtype
        assert out.shape == (count, matrix.shape[0])
        assert (out.float() - wanted).abs().max() <= most * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_that_of_the_widened_weight(
    kind: CodeKind, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    matrix = made(kind, shape, generator)
    assert_product(matrix, generator, dtype)
    assert_product(matrix, generator, dtype, bias=torch.randn(shape[0], generator=generator))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_order_and_smoothing_apply_to_the_input(kind: CodeKind, generator: torch.Generator) -> None:
    matrix = replace(
        made(kind, (48, 64), generator),
        input_order=torch.randperm(64, generator=generator),
        smoothing=torch.rand(64, generator=generator) + 0.5,
    )
    assert_product(matrix, generator, torch.float32)
    assert_product(matrix, generator, torch.bfloat16)


@pytest.mark.parametrize("group_size", [8, 32, 64, 96, 192])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_groups_and_zeros_of_any_kind(
    group_size: int, signed: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    low = -8 if signed else 0
    codes = torch.randint(low, low + 16, (40, 192), generator=generator).to(torch.int8)
    scales = torch.rand(40, 192 // group_size, generator=generator) + 0.1
    matrix = QuantizedMatrix("int4", codes, scales)
    assert_product(matrix, generator, dtype)
    zeros = torch.randn(scales.shape, generator=generator) * 3 + 7
    assert_product(replace(matrix, zeros=zeros), generator, dtype)
    assert_product(replace(matrix, kind="int8", zeros=zeros), generator, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("fixed", [False, True])
def test_rounded_inputs(kind: CodeKind, fixed: bool, generator: torch.Generator) -> None:
    matrix = made(kind, (48, 96), generator)
    scale = (4.5 / 448 if kind == "fp8" else 4.5 / 127) if fixed else None
    matrix = replace(matrix, quantizes_input=True, input_scale=scale)
    product = make_quantized_linear(matrix, None, torch.float32, CPU)
    x = torch.randn(9, 96, generator=generator)
    most = 448.0 if kind == "fp8" else 127.0
    step = scale or x.abs().amax(1, keepdim=True) / most
    codes = (x / step).clamp(-most, most)
    codes = codes.to(torch.float8_e4m3fn).float() if kind == "fp8" else codes.round()
    wanted = (codes * step) @ matrix.dequantize(torch.float32).T
    # A code on the edge of two may be rounded either way.
    assert (product(x) - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("quantizes_input", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_row_depends_on_itself_alone(
    kind: CodeKind, quantizes_input: bool, generator: torch.Generator
) -> None:
    matrix = replace(made(kind, (96, 64), generator), quantizes_input=quantizes_input)
    product = make_quantized_linear(matrix, None, torch.bfloat16, CPU)
    x = torch.randn(16, 64, generator=generator).bfloat16()
    other = torch.randn(16, 64, generator=generator).bfloat16() * 50
    other[3] = x[5]
    assert torch.equal(product(x)[5], product(other)[3])


def test_zero_inputs_give_the_bias(generator: torch.Generator) -> None:
    bias = torch.randn(32, generator=generator)
    for quantizes_input in (False, True):
        for kind in ("int8", "int4", "fp8"):
            matrix = replace(made(kind, (32, 64), generator), quantizes_input=quantizes_input)
            product = make_quantized_linear(matrix, bias, torch.float32, CPU)
            assert torch.equal(product(torch.zeros(2, 64)), bias.expand(2, -1))
