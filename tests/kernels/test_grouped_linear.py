import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
)
from splitserve_kernels.small_tiles import TOLERANCE, TilePlan

from .linear_inputs import draw, poisoned, worst_error


def offsets_of(counts: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(dtype)


def check(
    counts: list[int], n: int, k: int, dtype: torch.dtype, plan: TilePlan | None, *, spare: int = 0
) -> None:
    rows = sum(counts)
    x = draw(rows + spare, k, dtype=dtype, seed=rows * n + k)
    weights = draw(len(counts), n, k, dtype=dtype, seed=rows + n)
    out = poisoned(rows + spare, n, dtype)
    offsets = offsets_of(counts)
    assert grouped_linear(x, weights, offsets, out=out, plan=plan) is out
    exact = grouped_linear_reference(x, weights, offsets)
    assert out[rows:].isnan().all()
    if rows:
        assert worst_error(out[:rows], exact[:rows]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "counts", [[5], [0, 3, 0, 17, 16, 0], [1, 1, 1, 1], [40, 0], [0, 0, 0, 33]]
)
def test_any_counts(dtype: torch.dtype, counts: list[int]) -> None:
    check(counts, 96, 100, dtype, TilePlan(16, 32, 32))


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    n=st.integers(16, 150),
    k=st.integers(1, 150),
    block_m=st.sampled_from([16, 32]),
    spare=st.integers(0, 3),
)
def test_any_sides(counts: list[int], n: int, k: int, block_m: int, spare: int) -> None:
    check(counts, n, k, torch.float32, TilePlan(block_m, 64, 64), spare=spare)


@pytest.mark.parametrize("counts", [[2, 0, 7], [100, 20, 90], [300]])
def test_the_plans_that_are_chosen(counts: list[int]) -> None:
    check(counts, 130, 70, torch.float16, None)


def test_wide_offsets_and_views() -> None:
    x = draw(6, 90, dtype=torch.float32, seed=1)[:, 10:74]
    weights = draw(2, 32, 64, dtype=torch.float32, seed=2)
    offsets = offsets_of([2, 4], torch.int64)
    out = poisoned(6, 64, torch.float32)
    grouped_linear(x, weights, offsets, out=out[:, 32:])
    exact = grouped_linear_reference(x, weights, offsets)
    assert worst_error(out[:, 32:], exact) <= TOLERANCE[torch.float32]
    assert out[:, :32].isnan().all()


def test_no_rows() -> None:
    out = grouped_linear(torch.zeros(0, 32), torch.zeros(2, 16, 32), offsets_of([0, 0]))
    assert out.shape == (0, 16)


def test_what_cannot_be_computed_is_refused() -> None:
    x, weights, offsets = torch.zeros(4, 32), torch.zeros(2, 16, 32), offsets_of([1, 3])
    with pytest.raises(ValueError, match="do not go together"):
        grouped_linear(x, torch.zeros(2, 16, 33), offsets)
    with pytest.raises(ValueError, match="do not fit 2 experts"):
        grouped_linear(x, weights, offsets[:2])
    with pytest.raises(ValueError, match="float64"):
        grouped_linear(x.double(), weights.double(), offsets)
    with pytest.raises(ValueError, match="out"):
        grouped_linear(x, weights, offsets, out=torch.zeros(4, 15))
