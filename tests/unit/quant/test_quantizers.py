"""Weights to codes and back."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitserve.quant import quantizers
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8

SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96]))
MAGNITUDES = st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30])


@pytest.fixture
def weight() -> Tensor:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return torch.randn(48, 96, generator=torch.Generator().manual_seed(seed))


def drawn(shape: tuple[int, int], magnitude: float, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude


def squared_error(matrix: QuantizedMatrix, weight: Tensor, importance: Tensor) -> float:
    return float(((matrix.dequantize(torch.float32) - weight).square() * importance).sum())


@settings(max_examples=30, deadline=None)
@given(SHAPES, MAGNITUDES, st.integers(0, 1 << 30))
def test_int8_is_off_by_half_a_step_at_most(
    shape: tuple[int, int], magnitude: float, seed: int
) -> None:
    weight = drawn(shape, magnitude, seed)
    matrix = quantize_int8(weight)
    error = (matrix.dequantize(torch.float32) - weight).abs()
    assert (error <= 0.5001 * matrix.scales).all()
    assert (matrix.scales <= weight.abs().amax(1, keepdim=True) / 127 * 1.008).all()


@settings(max_examples=30, deadline=None)
@given(SHAPES, MAGNITUDES, st.integers(0, 1 << 30))
def test_fp8_is_off_by_a_sixteenth_at_most(
    shape: tuple[int, int], magnitude: float, seed: int
) -> None:
    weight = drawn(shape, magnitude, seed)
    matrix = quantize_fp8(weight)
    error = (matrix.dequantize(torch.float32) - weight).abs()
    # Three bits of fraction; below the normal numbers steps are 2^-9 of a scale.
    assert (error <= torch.maximum(weight.abs() / 16, matrix.scales / 1024) * 1.0001).all()


@settings(max_examples=30, deadline=None)
@given(SHAPES, MAGNITUDES, st.sampled_from([16, 32]), st.integers(0, 1 << 30))
def test_int4_is_as_good_as_its_whole_range(
    shape: tuple[int, int], magnitude: float, group_size: int, seed: int
) -> None:
    weight = drawn(shape, magnitude, seed)
    matrix = quantize_int4(weight, group_size)
    assert matrix.zeros is not None
    assert matrix.group_size == group_size
    assert 0 <= int(matrix.codes.min()) <= int(matrix.codes.max()) <= 15
    assert torch.equal(matrix.zeros, matrix.zeros.round().clamp(0, 15))
    values = weight.view(shape[0], -1, group_size)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    step = (high - low) / 15 * 1.008
    error = (matrix.dequantize(torch.float32) - weight).view_as(values).div(step[..., None])
    # Half a step for the code and half a one for the zero, and clipping only ever gains.
    assert (error.square().sum(-1) <= group_size).all()


def test_int4_clips_where_that_loses_less(weight: Tensor) -> None:
    ones = torch.ones(96)
    clipped = squared_error(quantize_int4(weight), weight, ones)
    coded = quantizers._encode_int4(weight.view(48, 3, 32), 1.0)
    whole = float((coded.values().view_as(weight) - weight).square().sum())
    assert clipped < 0.97 * whole


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_an_importance_lowers_the_error_that_it_weighs(
    quantize: type[QuantizedMatrix], weight: Tensor
) -> None:
    importance = torch.ones(96)
    importance[torch.arange(0, 96, 8)] = 100.0
    weight[:, 5] *= 3
    plain = squared_error(quantize(weight), weight, importance)
    weighed = squared_error(quantize(weight, input_importance=importance), weight, importance)
    assert weighed < plain


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8])
def test_slabs_change_nothing(
    quantize: type[QuantizedMatrix], weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(weight)
    monkeypatch.setattr(quantizers, "_SLAB_WEIGHTS", 7 * 96)
    parts = quantize(weight)
    assert torch.equal(whole.codes.view(torch.int8), parts.codes.view(torch.int8))
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8])
def test_zeros_stay_zeros_and_scales_are_bf16(quantize: type[QuantizedMatrix]) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5] = 2.7
    matrix = quantize(weight)
    values = matrix.dequantize(torch.float32)
    assert torch.equal(values[[0, 2]], torch.zeros(2, 64))
    assert float(values[1, 5]) == pytest.approx(2.7, rel=0.04)
    assert torch.equal(matrix.scales.bfloat16().float(), matrix.scales)


def test_what_cannot_be_quantised_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="groups of 40 do not divide 96 columns"):
        quantize_int4(weight, 40)
    weight[3, 4] = float("inf")
    for quantize in (quantize_int8, quantize_int4, quantize_fp8):
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight)
