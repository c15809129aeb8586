import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.small_linear import (
    choose,
    gate_reference,
    small_gated_linear,
    small_gated_linear_reference,
    small_linear,
    small_linear_reference,
)
from splitserve_kernels.small_linear_fp8 import (
    choose_fp8,
    small_linear_fp8,
    small_linear_fp8_reference,
)
from splitserve_kernels.small_multiply import Activation, multiply
from splitserve_kernels.small_tiles import MAX_ROWS, TOLERANCE, TilePlan, counters, fill

from .linear_inputs import draw, poisoned, worst_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 8, 33, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_few_rows(dtype: torch.dtype, m: int, splits: int) -> None:
    x, weight = draw(m, 160, dtype=dtype, seed=m), draw(96, 160, dtype=dtype, seed=m + 1)
    bias, out = draw(96, dtype=dtype, seed=3), poisoned(m, 96, dtype)
    plan = TilePlan(64 if m > 32 else 32 if m > 8 else 8, 32, 32, splits)
    result = small_linear(x, weight, bias=bias, out=out, plan=plan)
    assert result is out
    assert worst_error(out, small_linear_reference(x, weight, bias=bias)) <= TOLERANCE[dtype]


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, MAX_ROWS),
    n=st.integers(16, 200),
    k=st.integers(1, 300),
    splits=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_any_sides(m: int, n: int, k: int, splits: int, seed: int) -> None:
    dtype = torch.float32
    x, weight = draw(m, k, dtype=dtype, seed=seed), draw(n, k, dtype=dtype, seed=seed + 1)
    out = poisoned(m, n, dtype)
    small_linear(x, weight, out=out, plan=TilePlan(64, 64, 64, splits))
    assert worst_error(out, small_linear_reference(x, weight)) <= TOLERANCE[dtype]
    assert counters(CPU).eq(0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [1, 2])
def test_gated(activation: Activation, splits: int) -> None:
    for m, n, k, dtype in [(5, 72, 100, torch.float32), (17, 64, 128, torch.float16)]:
        x, weight = draw(m, k, dtype=dtype, seed=m), draw(2 * n, k, dtype=dtype, seed=7)
        out = poisoned(m, n, dtype)
        plan = TilePlan(32, 32, 32, splits)
        small_gated_linear(x, weight / k**0.5, activation, out=out, plan=plan)
        exact = small_gated_linear_reference(x, weight / k**0.5, activation)
        assert worst_error(out, exact) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("splits", [1, 2])
def test_scaled_as_codes_are(gate: Activation | None, splits: int) -> None:
    """What the fp8 products are, in a type that the interpreter can multiply."""
    dtype, m, n, k = torch.float16, 6, 64, 96
    x, weight = draw(m, k, dtype=dtype, seed=1), draw(n, k, dtype=dtype, seed=2)
    steps, scales = draw(m, dtype=torch.float32, seed=3), draw(n, dtype=torch.float32, seed=4) / 9
    columns = n // 2 if gate else n
    out = poisoned(m, columns, dtype)
    plan = TilePlan(16, 32, 32, splits)
    multiply(x, weight, out, plan, steps=steps, scales=scales, gate=gate)
    exact = small_linear_fp8_reference(x, steps, weight, scales)
    if gate:
        exact = gate_reference(exact, gate)
    assert worst_error(out, exact) <= 2 * TOLERANCE[dtype]


def test_fp8_refuses_what_cannot_be_computed() -> None:
    codes = torch.zeros(2, 64).to(torch.float8_e4m3fn)
    weight = torch.zeros(32, 64).to(torch.float8_e4m3fn)
    steps, scales = torch.ones(2), torch.ones(32)
    with pytest.raises(ValueError, match="float32"):
        small_linear_fp8(codes.float(), steps, weight, scales)
    with pytest.raises(ValueError, match="scales"):
        small_linear_fp8(codes, steps, weight, scales[:31])
    with pytest.raises(ValueError, match="steps"):
        small_linear_fp8(codes, steps.half(), weight, scales)
    with pytest.raises(ValueError, match="out"):
        small_linear_fp8(codes, steps, weight, scales, out=torch.zeros(2, 31))
    with pytest.raises(ValueError, match="16s"):
        small_linear_fp8(codes[:, :60], steps, weight[:, :60], scales)


def test_what_is_chosen_for_fp8() -> None:
    assert choose_fp8(1, 28672, 4096, gated=True, num_processors=132)
    assert choose_fp8(65, 28672, 4096, num_processors=132) is None


def test_views() -> None:
    dtype = torch.float32
    x = draw(4, 400, dtype=dtype, seed=1)[:, 100:228]
    weight = draw(64, 128, dtype=dtype, seed=2)
    stream = draw(4, 100, dtype=dtype, seed=3)
    before = stream.clone()
    small_linear(x, weight, out=stream[:, 20:84], plan=TilePlan(8, 64, 32, 2))
    exact = small_linear_reference(x, weight)
    assert worst_error(stream[:, 20:84], exact) <= TOLERANCE[dtype]
    assert torch.equal(stream[:, :20], before[:, :20])
    assert torch.equal(stream[:, 84:], before[:, 84:])


def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = (
        draw(7, 128, dtype=torch.float16, seed=1),
        draw(64, 128, dtype=torch.float16, seed=2),
    )
    alone = small_linear(x[3:4], weight)
    x[2] = torch.nan
    assert torch.equal(small_linear(x, weight)[3:4], alone)


@pytest.mark.parametrize(
    ("tiles", "most", "least", "splits"),
    [(448, 8, 1.4, 1), (96, 8, 1.4, 2), (64, 8, 1.4, 4), (1, 8, 1.4, 8), (1, 5, 1.4, 4)],
)
def test_splits_fill_the_device(tiles: int, most: int, least: float, splits: int) -> None:
    assert fill(tiles, most, 132, least=least) == splits


def test_what_is_chosen() -> None:
    assert choose(1, 28672, 4096, torch.bfloat16, gated=True, num_processors=132)
    assert choose(16, 4096, 4096, torch.float16, num_processors=132)
    assert choose(64, 4096, 4096, torch.bfloat16, num_processors=132) is None
    assert choose(65, 28672, 4096, torch.bfloat16, num_processors=132) is None
    assert choose(1, 28672, 4096, torch.float32, num_processors=132) is None
    assert choose(1, 100, 100, torch.bfloat16, num_processors=132) is None


def test_what_cannot_be_computed_is_refused() -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(32, 64)
    with pytest.raises(ValueError, match="has 65 rows"):
        small_linear(torch.zeros(65, 64), weight)
    with pytest.raises(ValueError, match="do not go together"):
        small_linear(x, torch.zeros(32, 48))
    with pytest.raises(ValueError, match="float64"):
        small_linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="out"):
        small_linear(x, weight, out=torch.zeros(2, 31))
    with pytest.raises(ValueError, match="no half"):
        small_gated_linear(x, torch.zeros(31, 64), "silu")
    with pytest.raises(ValueError, match="relu"):
        small_gated_linear(x, weight, "relu")  # type: ignore[arg-type]
