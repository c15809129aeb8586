"""Every product of codes against the widened weight."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.matrix import CodeKind, QuantizedMatrix
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8
from splitserve.quant.slab_linear import fp8_as_half
from splitserve.quant.vnni import jit
from splitserve.quant.vnni import linear as vnni
from splitserve.quant.vnni.jit import omp_calls
from splitserve.quant.vnni.linear import VnniLinear

CPU = torch.device("cpu")
HAS_JIT = omp_calls() is not None
SHAPES = [(7, 33), (24, 64), (80, 576), (130, 96)]


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["jit", "library"], autouse=True)
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With code made for the processor, and with what torch has everywhere."""
    if request.param == "library":
        monkeypatch.setattr(vnni, "omp_calls", lambda: None)
    elif not HAS_JIT:
        pytest.skip("no AVX512-VNNI and AVX512-BF16, or no llvmlite")
    name: str = request.param
    return name


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
    x = torch.randn(9, 96, generator=generator).bfloat16().float()
    most = 448.0 if kind == "fp8" else 127.0
    step = scale or x.abs().amax(1, keepdim=True) / most
    codes = (x / step).clamp(-most, most)
    codes = codes.to(torch.float8_e4m3fn).float() if kind == "fp8" else codes.round()
    wanted = (codes * step) @ matrix.dequantize(torch.float32).T
    # A code on the edge of two may be rounded either way.
    for dtype in (torch.float32, torch.bfloat16):
        out = make_quantized_linear(matrix, None, dtype, CPU)(x.to(dtype))
        assert (out.float() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


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


@pytest.mark.parametrize("quantizes_input", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_made_code_gives_a_row_the_same_bits_in_any_batch(
    kind: CodeKind, quantizes_input: bool, code: str, generator: torch.Generator
) -> None:
    if code != "jit":
        pytest.skip("libraries choose kernels by the number of rows")
    rounds = quantizes_input and kind != "fp8"
    matrix = replace(made(kind, (96, 128), generator), quantizes_input=rounds)
    product = VnniLinear(matrix, None)
    x = torch.randn(23, 128, generator=generator).bfloat16()
    alone = torch.cat([product(row[None]) for row in x])
    for count in range(1, 24):
        assert torch.equal(product(x[:count]), alone[:count])


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_made_code_is_used_where_it_can_be(kind: CodeKind, code: str) -> None:
    matrix = made(kind, (32, 64), torch.Generator())
    product = make_quantized_linear(matrix, None, torch.bfloat16, CPU)
    assert isinstance(product, VnniLinear) == (code == "jit")


def test_made_code_refuses_other_inputs(code: str) -> None:
    if code != "jit":
        pytest.skip("torch checks shapes itself")
    product = VnniLinear(quantize_int8(torch.ones(32, 64)), None)
    with pytest.raises(ValueError, match="64 bf16 numbers a row"):
        product(torch.ones(1, 32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        product(torch.ones(1, 64))


def test_inputs_need_not_be_contiguous_and_may_be_none(generator: torch.Generator) -> None:
    x = torch.randn(64, 3, generator=generator).bfloat16()
    for kind in ("int8", "int4", "fp8"):
        matrix = made(kind, (32, 64), generator)
        product = make_quantized_linear(matrix, None, torch.bfloat16, CPU)
        assert torch.equal(product(x.T), product(x.T.contiguous()))
        assert product(x.T[:0]).shape == (0, 32)


@pytest.mark.parametrize("inputs", ["wide", "rounded by row", "rounded by a fixed step"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_that_are_not_finite_stay_in_their_row(
    kind: CodeKind, inputs: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    matrix = replace(
        made(kind, (32, 64), generator),
        quantizes_input=inputs != "wide",
        input_scale=0.03 if inputs == "rounded by a fixed step" else None,
    )
    product = make_quantized_linear(matrix, None, dtype, CPU)
    x = torch.randn(6, 64, generator=generator).to(dtype)
    good = product(x)
    x[1, 7] = float("nan")
    x[4, 63] = -float("nan")
    bad = product(x)
    assert bad[[1, 4]].isnan().all()
    assert torch.equal(bad[[0, 2, 3, 5]], good[[0, 2, 3, 5]])
    assert good.isfinite().all()


@pytest.mark.parametrize("range_", [(-9, 0), (0, 16), (-1, 8)])
def test_int4_codes_of_no_kernel_are_refused(range_: tuple[int, int]) -> None:
    low, high = range_
    codes = torch.zeros(4, 32, dtype=torch.int8)
    codes[1, 3], codes[2, 5] = low, high
    with pytest.raises(ValueError, match=f"not in {low}..{high}"):
        make_quantized_linear(
            QuantizedMatrix("int4", codes, torch.ones(4, 1)), None, torch.bfloat16, CPU
        )


@pytest.fixture
def real_probe(code: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Once, and on any processor: what `code` replaced is back, with nothing remembered."""
    if code == "jit":
        pytest.skip("tested once")
    monkeypatch.setattr(vnni, "omp_calls", omp_calls)
    caches = (jit.omp_calls, jit.compiled, jit._warn_once)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.usefixtures("real_probe")
def test_a_processor_without_the_instructions_takes_the_library(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    binding = pytest.importorskip("llvmlite.binding")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx2": True, "avx512f": True})
    for kind in ("int8", "int4", "fp8"):
        matrix = made(kind, (80, 96), generator)
        assert not VnniLinear.takes(matrix, torch.bfloat16)
        assert_product(matrix, generator, torch.bfloat16)


@pytest.mark.skipif(not HAS_JIT, reason="no AVX512-VNNI and AVX512-BF16, or no llvmlite")
@pytest.mark.usefixtures("real_probe")
def test_code_that_cannot_be_made_is_replaced_by_the_library_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit, "module_text", lambda _variant, _omp: "not a module")
    with caplog.at_level(logging.WARNING):
        for kind in ("int8", "int4", "fp8"):
            matrix = made(kind, (80, 96), generator)
            assert not VnniLinear.takes(matrix, torch.bfloat16)
            assert_product(matrix, generator, torch.bfloat16)
    (record,) = caplog.records
    assert "LLVM cannot make code" in record.getMessage()


def test_every_fp8_code_keeps_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)  # the rest are not numbers
    wanted = codes.float()
    assert torch.equal(fp8_as_half(codes).float() * 256, wanted)
    matrix = QuantizedMatrix("fp8", codes[:, None].expand(-1, 16).contiguous(), torch.ones(254, 1))
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 3] = 1.0
    product = make_quantized_linear(matrix, None, torch.bfloat16, CPU)
    assert torch.equal(product(x)[0].float(), wanted)


def test_zero_inputs_give_the_bias(generator: torch.Generator) -> None:
    bias = torch.randn(32, generator=generator)
    for quantizes_input in (False, True):
        for kind in ("int8", "int4", "fp8"):
            matrix = replace(made(kind, (32, 64), generator), quantizes_input=quantizes_input)
            product = make_quantized_linear(matrix, bias, torch.float32, CPU)
            assert torch.equal(product(torch.zeros(2, 64)), bias.expand(2, -1))
