"""Scales between activations and weights: nothing changes but what rounding costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from splitserve.quant.inputs import row_scales
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_int4, quantize_int8
from splitserve.quant.scales import InputSeen, activation_aware, smooth

ROWS, COLUMNS = 64, 96
OUTLIERS = [3, 40, 77]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=generator)


def with_outliers(rows: int, generator: torch.Generator, factor: float = 60.0) -> Tensor:
    """A few channels are always large, as in language models."""
    inputs = torch.randn(rows, COLUMNS, generator=generator)
    inputs[:, OUTLIERS] *= factor
    return inputs


def product(matrix: QuantizedMatrix, inputs: Tensor) -> Tensor:
    """As it is defined, in fp32: smoothed, rounded to int8 where the matrix wants that."""
    if matrix.smoothing is not None:
        inputs = inputs / matrix.smoothing
    if matrix.quantizes_input:
        step = row_scales(inputs, 127.0)
        inputs = (inputs / step).round() * step
    return inputs @ replace(matrix, smoothing=None).dequantize(torch.float32).T


def error(matrix: QuantizedMatrix, weight: Tensor, inputs: Tensor) -> float:
    exact = inputs @ weight.T
    return float((product(matrix, inputs) - exact).square().mean() / exact.square().mean())


def test_what_was_seen_is_told_by_channel() -> None:
    seen = InputSeen(torch.tensor([[1.0, -4.0], [-3.0, 2.0]]))
    assert seen.most.tolist() == [3.0, 4.0]
    assert seen.mean.tolist() == [2.0, 3.0]
    assert InputSeen(seen.rows.bfloat16()).mean.dtype is torch.float32


def test_smoothing_leaves_the_weight_what_it_was(
    weight: Tensor, generator: torch.Generator
) -> None:
    """Within half a step of its row's scale, over the smoothing of its column."""
    made = smooth(weight, InputSeen(with_outliers(200, generator)))
    assert made.smoothing is not None
    assert made.quantizes_input
    most = made.scales / 2 / made.smoothing * 1.001
    assert ((made.dequantize(torch.float32) - weight).abs() <= most).all()


def test_smoothing_evens_inputs_and_weights_out(weight: Tensor, generator: torch.Generator) -> None:
    """Strength 0.5: afterwards each channel's greatest input is its greatest weight."""
    seen = InputSeen(with_outliers(200, generator))
    scale = smooth(weight, seen).smoothing
    assert scale is not None
    heaviest = weight.abs().amax(0) * scale
    assert torch.allclose(seen.most / scale, heaviest, rtol=1e-4)
    assert scale[OUTLIERS].min() > 3 * scale.median()


def test_outliers_cost_less_when_smoothed(weight: Tensor, generator: torch.Generator) -> None:
    made = smooth(weight, InputSeen(with_outliers(200, generator)))
    plain = replace(quantize_int8(weight), quantizes_input=True)
    unseen = with_outliers(100, generator)
    assert error(made, weight, unseen) < 0.5 * error(plain, weight, unseen)


def test_aware_scales_cost_less_where_inputs_are_large(
    weight: Tensor, generator: torch.Generator
) -> None:
    made = activation_aware(weight, InputSeen(with_outliers(200, generator, 20.0)))
    plain = quantize_int4(weight)
    unseen = with_outliers(100, generator, 20.0)
    assert made.smoothing is not None
    assert not made.quantizes_input
    assert error(made, weight, unseen) < 0.6 * error(plain, weight, unseen)


def test_alike_inputs_need_no_scales(weight: Tensor) -> None:
    made = activation_aware(weight, InputSeen(torch.eye(COLUMNS)))
    assert made.smoothing is not None
    assert torch.equal(made.smoothing, torch.ones(COLUMNS))


@pytest.mark.parametrize("make", [smooth, activation_aware])
@pytest.mark.parametrize("dead", ["input", "weight", "both", "everything"])
def test_channels_of_zeros_are_no_trouble(
    make: object, dead: str, weight: Tensor, generator: torch.Generator
) -> None:
    inputs = with_outliers(50, generator)
    if dead == "everything":
        weight, inputs = torch.zeros_like(weight), torch.zeros_like(inputs)
    if dead in ("input", "both"):
        inputs[:, 5] = 0
    if dead in ("weight", "both"):
        weight[:, 5] = 0
    assert callable(make)
    made: QuantizedMatrix = make(weight, InputSeen(inputs))
    assert made.smoothing is not None
    assert made.smoothing.isfinite().all()
    assert (made.smoothing > 0).all()
    found = product(made, inputs)
    assert found.isfinite().all()
    exact = inputs @ weight.T
    assert (found - exact).square().mean() <= 0.02 * exact.square().mean()
