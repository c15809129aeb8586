"""Rows that become codes on the way into a product.

The interpreter rounds to e4m3 wrongly: here codes are fp16 numbers up to the largest of e4m3, or
e4m3 numbers that need no rounding. `benchmarks/kernels/linear.py --whole` checks the rest on a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.small_linear_fp8 import (
    choose_fp8,
    small_gated_linear_fp8,
    small_gated_linear_fp8_reference,
    small_linear_fp8,
    small_linear_fp8_reference,
)
from splitserve_kernels.small_multiply import Activation
from splitserve_kernels.small_multiply_blocks import multiply_blocks
from splitserve_kernels.small_tiles import (
    MAX_ROWS,
    TOLERANCE,
    TWO_A_PROCESSOR,
    TilePlan,
    counters,
    pad_rows,
    round_blocks_reference,
)
from torch import Tensor

from splitserve.quant import fp8_linear
from splitserve.quant.fp8_linear import Fp8Linear
from splitserve.quant.linear_protocol import CodedRows
from splitserve.quant.matrix import QuantizedMatrix

from .linear_inputs import draw, poisoned, worst_error

CPU, E4M3 = torch.device("cpu"), torch.float8_e4m3fn


def uneven(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows whose parts are of different sizes, the first of which starts with zeros."""
    sizes: Tensor = 10 ** (3 * draw(m, -(-k // 24), dtype=torch.float32, seed=seed).clamp(-1, 1))
    x = draw(m, k, dtype=torch.float32, seed=seed + 1)
    x *= sizes.repeat_interleave(24, 1)[:, :k]
    x[0, :40] = 0
    return x.to(dtype)


def exact_codes(m: int, k: int, block_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """(m, k) e4m3 with the largest code in each block, and steps (m, 1), powers of two."""
    generator = torch.Generator().manual_seed(seed)
    codes = (60 * torch.randn(m, k, generator=generator)).to(E4M3).float()
    codes[:, ::block_k] = -448
    steps = 2.0 ** torch.randint(-9, 3, (m, 1), generator=generator)
    return codes.to(E4M3), steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 33, 64])
@pytest.mark.parametrize("splits", [1, 3])
def test_each_block_has_its_step(dtype: torch.dtype, m: int, splits: int) -> None:
    x, weight = uneven(m, 160, dtype, m), draw(96, 160, dtype=torch.float16, seed=m + 7)
    scales, bias = draw(96, dtype=torch.float32, seed=3) / 9, draw(96, dtype=dtype, seed=4)
    out = poisoned(m, 96, dtype)
    plan = TilePlan(pad_rows(m, 16), 32, 32, splits)
    multiply_blocks(x, weight, scales, out, plan, bias=bias)
    exact = small_linear_fp8_reference(x, None, weight, scales, bias=bias, block_k=32)
    assert worst_error(out, exact) <= TOLERANCE[dtype]


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, MAX_ROWS),
    n=st.integers(16, 200),
    k=st.integers(1, 300),
    splits=st.integers(1, 5),
    gate=st.sampled_from([None, "silu", "gelu"]),
    seed=st.integers(0, 2**31),
)
def test_any_sides(m: int, n: int, k: int, splits: int, gate: Activation | None, seed: int) -> None:
    dtype = torch.float32
    height = 2 * n if gate else n
    x, weight = uneven(m, k, dtype, seed), draw(height, k, dtype=torch.float16, seed=seed + 1)
    # Gates neither shut nor wide open.
    scales = torch.full((height,), 1 / (1 + float(x.abs().max())) / k**0.5)
    out = poisoned(m, n, dtype)
    multiply_blocks(x, weight, scales, out, TilePlan(64, 64, 64, splits), gate=gate)
    if gate:
        exact = small_gated_linear_fp8_reference(x, None, weight, scales, gate, block_k=64)
    else:
        exact = small_linear_fp8_reference(x, None, weight, scales, block_k=64)
    assert worst_error(out, exact) <= 2 * TOLERANCE[dtype]
    assert counters(CPU).eq(0).all()


@pytest.mark.parametrize("splits", [1, 2])
def test_gated(splits: int) -> None:
    dtype = torch.float16
    x, weight = draw(17, 128, dtype=dtype, seed=1), draw(144, 128, dtype=dtype, seed=2)
    scales, out = torch.rand(144) / 9, poisoned(17, 72, dtype)
    multiply_blocks(x, weight, scales, out, TilePlan(32, 32, 32, splits), gate="silu")
    exact = small_gated_linear_fp8_reference(x, None, weight, scales, "silu", block_k=32)
    assert worst_error(out, exact) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("gate", [None, "silu"])
def test_rows_that_need_no_rounding_give_what_their_codes_give(gate: Activation | None) -> None:
    codes, steps = exact_codes(6, 320, 64, seed=5)
    weight, scales = draw(64, 320, dtype=torch.float32, seed=6).to(E4M3), torch.rand(64) / 2000
    x, plan = codes.float() * steps, TilePlan(16, 32, 64, 2, precise_k=32)
    out = poisoned(6, 32 if gate else 64, torch.float16)
    for rows, its_steps in ((codes, steps), (x, None), (x.half(), None)):
        operands = (rows, its_steps, weight, scales)
        if gate:
            small_gated_linear_fp8(*operands, gate, out=out, plan=plan)
        else:
            small_linear_fp8(*operands, out=out, plan=plan)
        exact = small_linear_fp8_reference(codes, steps, weight, scales)
        if gate:
            exact = small_gated_linear_fp8_reference(codes, steps, weight, scales, gate)
        assert worst_error(out, exact) <= 2 * TOLERANCE[torch.float16]
        out.fill_(torch.nan)


def test_an_outlier_costs_its_own_block_alone() -> None:
    x = draw(4, 512, dtype=torch.float32, seed=1)
    x[:, 300] = 1e7
    rounded = round_blocks_reference(x, 128, E4M3)
    near = ((rounded - x).abs() <= x.abs() / 15 + 1e-2).view(4, 4, 128)
    assert near[:, [0, 1, 3]].all()
    assert (rounded[:, 256:384] == 0).sum(1).eq(127).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_tiny_huge_and_what_is_not_finite() -> None:
    x = torch.zeros(7, 96)
    x[1] = 1e-38
    x[2, 50] = torch.inf
    x[3, 50], x[3, 51] = torch.nan, 1.0
    x[4] = 3e38 * torch.linspace(-1, 1, 96)
    x[5, 3], x[5, 40] = -torch.inf, torch.nan
    x[6] = 1.0
    weight, out = torch.eye(96).repeat(2, 1)[:100].half(), poisoned(7, 100, torch.float32)
    multiply_blocks(x, weight, torch.full((100,), 1e-3), out, TilePlan(16, 32, 32, 2))
    assert out[:2].abs().max() < 1e-30
    assert out[[2, 3, 5]].isnan().all()
    torch.testing.assert_close(out[4, :96], x[4] / 1000, rtol=2**-10, atol=1e32)
    torch.testing.assert_close(out[6], torch.full((100,), 1e-3))


def test_rows_do_not_depend_on_each_other() -> None:
    x, weight = uneven(7, 128, torch.float16, 1), draw(64, 128, dtype=torch.float16, seed=2)
    plan, alone, out = TilePlan(16, 64, 64), torch.empty(1, 64), torch.empty(7, 64)
    multiply_blocks(x[3:4], weight, torch.ones(64), alone, plan)
    x[2] = 6e4
    multiply_blocks(x, weight, torch.ones(64), out, plan)
    assert torch.equal(out[3:4], alone)


def test_parts_of_wider_rows() -> None:
    x, weight = uneven(4, 400, torch.float32, 1), draw(64, 128, dtype=torch.float16, seed=2)
    stream = poisoned(4, 100, torch.float32)
    part = x[:, 100:228]
    multiply_blocks(part, weight, torch.ones(64), stream[:, 20:84], TilePlan(16, 64, 32, 2))
    exact = small_linear_fp8_reference(part, None, weight, torch.ones(64), block_k=32)
    assert worst_error(stream[:, 20:84], exact) <= TOLERANCE[torch.float32]
    assert stream[:, :20].isnan().all()
    assert stream[:, 84:].isnan().all()


def test_what_cannot_be_computed_is_refused() -> None:
    codes, weight, scales = (
        torch.zeros(2, 64).to(E4M3),
        torch.zeros(32, 64).to(E4M3),
        torch.ones(32),
    )
    with pytest.raises(ValueError, match="float8"):
        small_linear_fp8(codes, None, weight, scales)
    with pytest.raises(ValueError, match="float64"):
        small_linear_fp8(codes.double(), None, weight, scales)
    with pytest.raises(ValueError, match="65"):
        small_linear_fp8(torch.zeros(65, 64), None, weight, scales)
    with pytest.raises(ValueError, match="descriptor"):
        small_linear_fp8(codes.half(), None, weight, scales, plan=TilePlan(16, 32, 32, tma=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (28672, 4096), (6144, 4096)])
@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_plans_for_whole_rows_fit(m: int, n: int, k: int, gated: bool) -> None:
    coded = choose_fp8(m, n, k, num_processors=132, gated=gated)
    plan = choose_fp8(m, n, k, num_processors=132, gated=gated, coded=False)
    assert coded
    assert plan
    assert plan.splits == coded.splits
    assert plan.num_stages >= 3
    weight = plan.block_n * plan.block_k * (2 if gated else 1)
    rows = 2 * plan.block_m * plan.block_k
    used = plan.num_stages * weight + (plan.num_stages - 1) * rows + rows // 2
    assert used <= 2 * TWO_A_PROCESSOR


class Recorded:
    """Calls the real thing, and remembers the steps that products got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most_rows: int) -> None:
        self.steps: list[Tensor | None] = []
        monkeypatch.setattr(fp8_linear, "MOST_WHOLE_ROWS", most_rows)
        for name in ("small_linear_fp8", "small_gated_linear_fp8"):
            monkeypatch.setattr(fp8_linear, name, self._recorded(getattr(fp8_linear, name)))

    def _recorded(self, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, steps: Tensor | None, *rest: object, **options: object) -> Tensor:
            self.steps.append(steps)
            return product(x, steps, *rest, **options)

        return call


@pytest.mark.parametrize("most_rows", [0, 2])
def test_few_rows_go_in_whole(most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, dtype = 1024, 4096, torch.float16
    codes, steps = exact_codes(3, k, 128, seed=8)
    x, scales = (codes.float() * steps).to(dtype), torch.rand(n, 1) / 1000
    weight = draw(n, k, dtype=torch.float32, seed=9).to(E4M3)
    linear = Fp8Linear(QuantizedMatrix("fp8", weight, scales, None), None, dtype)
    recorded = Recorded(monkeypatch, most_rows)
    assert (
        worst_error(linear(x[:2]), small_linear_fp8_reference(codes[:2], steps[:2], weight, scales))
        < 1e-3
    )
    assert (recorded.steps.pop() is None) == (most_rows == 2)
    linear(x)
    assert recorded.steps.pop() is not None
    out = linear.gated(x[:1], "silu")
    if most_rows:
        assert recorded.steps == [None]
        assert out is not None
        exact = small_gated_linear_fp8_reference(codes[:1], steps[:1], weight, scales, "silu")
        assert worst_error(out, exact) < 2e-3
    else:
        assert out is None
    assert linear.gated(CodedRows(codes, steps), "silu") is not None
