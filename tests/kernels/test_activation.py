from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.activation import (
    Activation,
    activate,
    activate_fp8,
    activate_fp8_reference,
    activate_reference,
)
from torch import Tensor

from splitserve.models.config import MlpConfig
from splitserve.models.layers.activation import make_activation

NAMES: list[Activation] = list(get_args(Activation))
# Exponentials differ in their last bits, which tips a rounding here and there.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-9}


def layer(name: Activation, gated: bool, limit: float, x: Tensor) -> Tensor:
    config = MlpConfig(size=x.shape[1], activation=name, gated=gated, limit=limit)
    return make_activation(config)(x)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    size=st.sampled_from([1, 8, 37, 256, 1500]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    name=st.sampled_from(NAMES),
    gated=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_layers(
    rows: int, size: int, dtype: torch.dtype, name: Activation, gated: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    gated = gated or name == "clamped_swiglu"
    width = size * (1 + gated)
    # Rows are a part of wider ones.
    x = (4 * torch.randn(rows, width + 8)).to(dtype)[:, 8:]
    out = activate(x, name, gated=gated, limit=3.0)
    expected = layer(name, gated, 3.0, x)
    assert out.dtype == expected.dtype
    # A product of two rounded numbers has the roundings of both.
    tolerance = 3 * TOLERANCE[dtype]
    # Where 1 + erf(x) or 1 + tanh(x) is near zero, torch's is what cancellation left.
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=2e-5 if "gelu" in name else 1e-6)
    assert torch.equal(activate_reference(x, name, gated=gated, limit=3.0), expected)
    if dtype is torch.float16 and size > 8 and name not in ("gelu", "gelu_tanh"):
        assert (out == expected).float().mean() > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity(name: Activation) -> None:
    x = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan, 100.0, 100.0, 2.0, 2.0]])
    out = activate(x, name, gated=True)
    torch.testing.assert_close(out, activate_reference(x, name, gated=True), equal_nan=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("size", [100, 17000])
def test_as_codes(size: int, step: float | None, gated: bool) -> None:
    """With whole powers of two, which are codes already: the interpreter does not round."""
    x = torch.randint(-3, 9, (4, size * (1 + gated))).float().exp2()
    x[:, 5], x[1], x[2, 7] = 448.0, 0, torch.nan
    codes, steps = activate_fp8(x, "relu", gated=gated, step=step)
    expected, expected_steps = activate_fp8_reference(x, "relu", gated=gated, step=step)
    torch.testing.assert_close(steps, expected_steps, rtol=0, atol=0, equal_nan=True)
    assert steps[2].isnan()
    if gated and step is None:
        return  # the steps are no powers of two
    assert torch.equal(codes[[0, 1, 3]].float(), expected[[0, 1, 3]].float())


@pytest.mark.parametrize(
    ("width", "name", "gated", "named"),
    [(7, "silu", True, "7 columns"), (8, "clamped_swiglu", False, "always gated")],
)
def test_what_cannot_be_computed_is_refused(
    width: int, name: Activation, gated: bool, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        activate(torch.zeros(1, width), name, gated=gated)
