"""GPTQ: rounding that makes up for itself in the columns that are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitserve.quant.gptq import quantize_int4_gptq
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_int4

ROWS, COLUMNS = 48, 96


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator)


def product_error(matrix: QuantizedMatrix, weight: Tensor, inputs: Tensor) -> float:
    """Of what the matrix was not made with, too: the share of the product's square."""
    exact = inputs @ weight.T
    found = inputs @ matrix.dequantize(torch.float32).T
    return float((found - exact).square().mean() / exact.square().mean())


def correlated(rows: int, generator: torch.Generator) -> Tensor:
    """Inputs that a few directions explain, as those of language models."""
    directions = torch.randn(12, COLUMNS, generator=torch.Generator().manual_seed(11))
    noise = torch.randn(rows, COLUMNS, generator=generator) * 0.1
    return torch.randn(rows, 12, generator=generator) @ directions + noise


def test_correlated_inputs_lose_less_than_by_plain_rounding(
    weight: Tensor, generator: torch.Generator
) -> None:
    made = quantize_int4_gptq(weight, correlated(512, generator))
    plain = quantize_int4(weight)
    unseen = correlated(256, generator)
    assert product_error(made, weight, unseen) < 0.25 * product_error(plain, weight, unseen)


def test_the_weight_itself_is_further_away(weight: Tensor, generator: torch.Generator) -> None:
    """Which shows that errors were moved, not that rounding got better."""
    made = quantize_int4_gptq(weight, correlated(512, generator)).dequantize(torch.float32)
    plain = quantize_int4(weight).dequantize(torch.float32)
    assert (made - weight).square().mean() > (plain - weight).square().mean()


def test_independent_inputs_leave_nothing_to_make_up_for(weight: Tensor) -> None:
    """Each input alone: a column's error meets no other column's input."""
    made = quantize_int4_gptq(weight, torch.eye(COLUMNS) * 3)
    plain = quantize_int4(weight)
    assert torch.equal(made.scales, plain.scales)
    assert torch.equal(made.dequantize(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize("group_size", [8, 32, 96])
def test_the_form_is_that_of_plain_rounding(
    group_size: int, weight: Tensor, generator: torch.Generator
) -> None:
    made = quantize_int4_gptq(weight, correlated(64, generator), group_size)
    assert (made.kind, made.shape, made.group_size) == ("int4", (ROWS, COLUMNS), group_size)
    assert made.codes.dtype is torch.int8
    assert int(made.codes.min()) >= 0
    assert int(made.codes.max()) <= 15
    assert made.zeros is not None
    assert torch.equal(made.zeros, made.zeros.round())
    assert int(made.zeros.min()) >= 0
    assert int(made.zeros.max()) <= 15
    assert torch.equal(made.scales, made.scales.bfloat16().float())


@pytest.mark.parametrize("inputs", [torch.zeros(5, COLUMNS), torch.ones(1, COLUMNS)])
def test_inputs_that_say_little_are_taken(inputs: Tensor, weight: Tensor) -> None:
    """All zero, or one row alone: curvature without an inverse of its own."""
    made = quantize_int4_gptq(weight, inputs).dequantize(torch.float32)
    assert made.isfinite().all()
    assert (inputs @ made.T - inputs @ weight.T).abs().max() < 1.0


def test_neither_argument_is_changed(weight: Tensor, generator: torch.Generator) -> None:
    inputs = correlated(64, generator)
    before = weight.clone(), inputs.clone()
    quantize_int4_gptq(weight, inputs)
    assert torch.equal(weight, before[0])
    assert torch.equal(inputs, before[1])
