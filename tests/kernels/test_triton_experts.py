"""Experts whose routing stays on the device, against those that the host counts."""

import pytest
import torch

from splitserve.models.config import ExpertsConfig, MlpConfig
from splitserve.models.layers.activation import make_activation
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.linear import PlainLinear
from splitserve.models.triton_experts import MOST_ROWS, TritonExperts
from splitserve.models.triton_linear import TritonLinear

HIDDEN, SIZE, COUNT = 48, 32, 6


def make_mlp(config: MlpConfig, generator: torch.Generator) -> Mlp:
    def linear(rows: int, columns: int, bias: bool) -> TritonLinear:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return TritonLinear(weight, torch.randn(rows, generator=generator) if bias else None)

    return Mlp(
        linear(2 * SIZE, HIDDEN, config.bias),
        linear(HIDDEN, SIZE, config.down_bias),
        make_activation(config),
    )


@pytest.mark.parametrize("own", [range(COUNT), [1, 4]], ids=["all", "a-rank's"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 9])
def test_they_are_the_same(own: range | list[int], bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    mlp = MlpConfig(SIZE, bias=bias, down_bias=bias)
    config = ExpertsConfig(mlp, COUNT, top_k=2)
    experts = {number: make_mlp(mlp, generator) for number in own}
    router = PlainLinear(torch.randn(COUNT, HIDDEN, generator=generator), None)
    x = torch.randn(rows, HIDDEN, generator=generator)
    expected = Experts(config, router, experts)(x)
    found = TritonExperts(config, router, experts)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_steps_of_few_rows_keep_to_the_device() -> None:
    config = ExpertsConfig(MlpConfig(SIZE), 1, top_k=1)
    experts = {0: make_mlp(MlpConfig(SIZE), torch.Generator().manual_seed(0))}
    mixture = TritonExperts(config, PlainLinear(torch.ones(1, HIDDEN), None), experts)
    assert mixture.keeps_to_device(MOST_ROWS)
    assert not mixture.keeps_to_device(MOST_ROWS + 1)
