import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.paged_decode import (
    MAX_SPLITS,
    choose_splits,
    paged_decode,
    paged_decode_reference,
)
from splitserve_kernels.paged_kv import TOLERANCE

from .paged_cases import PagedCase, make_case, worst_error

RAGGED = [1, 16, 17, 64, 65, 300]


def decode(case: PagedCase, num_splits: int) -> torch.Tensor:
    out = case.poisoned_out
    paged_decode(*vars(case).values(), out, num_splits=num_splits)
    return out


def check(case: PagedCase, num_splits: int) -> None:
    exact = paged_decode_reference(*vars(case).values())
    assert worst_error(decode(case, num_splits), exact) <= TOLERANCE[case.queries.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_ragged_batch(dtype: torch.dtype, head_dim: int, group: int, num_splits: int) -> None:
    shape = {"rows": len(RAGGED), "kv_heads": 2, "group": group, "head_dim": head_dim}
    check(make_case(RAGGED, dtype=dtype, seed=group * head_dim, **shape), num_splits)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    block_tokens=st.sampled_from([4, 16, 24]),
    head_dim=st.sampled_from([8, 80, 256]),
    table_dtype=st.sampled_from([torch.int32, torch.int64]),
    num_splits=st.integers(1, MAX_SPLITS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_geometry(
    lengths: list[int],
    block_tokens: int,
    head_dim: int,
    table_dtype: torch.dtype,
    num_splits: int,
    seed: int,
) -> None:
    case = make_case(
        lengths,
        rows=len(lengths),
        kv_heads=1,
        group=2,
        head_dim=head_dim,
        dtype=torch.float32,
        seed=seed,
        block_tokens=block_tokens,
        table_dtype=table_dtype,
    )
    check(case, num_splits)


@pytest.mark.parametrize("num_splits", [1, 5])
def test_a_sequence_of_no_tokens_gives_zeros(num_splits: int) -> None:
    shape = {"rows": 2, "kv_heads": 1, "group": 4, "head_dim": 64}
    out = decode(make_case([0, 70], dtype=torch.float32, seed=1, **shape), num_splits)
    assert out[0].eq(0).all()
    assert out[1].isfinite().all()


def test_a_score_far_above_the_others_takes_all() -> None:
    shape = {"rows": 1, "kv_heads": 1, "group": 1, "head_dim": 64}
    case = make_case([200], dtype=torch.float16, seed=2, **shape)
    case.keys[case.page_table[0, 9], 3, 0] = case.queries[0, 0] * 100
    assert torch.equal(decode(case, 4)[0, 0], case.values[case.page_table[0, 9], 3, 0])


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "max_tokens", "splits"),
    [(1, 8, 131072, 64), (64, 8, 4096, 1), (1, 3, 300, 1), (8, 8, 4096, 8), (1, 1, 1 << 20, 64)],
)
def test_splits_fill_the_device(
    sequences: int, kv_heads: int, max_tokens: int, splits: int
) -> None:
    assert choose_splits(sequences, kv_heads, max_tokens, num_processors=132) == splits


@pytest.mark.parametrize(
    ("num_splits", "head_dim", "dtype", "named"),
    [
        (0, 64, torch.float32, "num_splits is 0"),
        (1, 64, torch.float64, "float64"),
        (1, 258, torch.float32, "head_dim 258"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    num_splits: int, head_dim: int, dtype: torch.dtype, named: str
) -> None:
    case = make_case([5], rows=1, kv_heads=1, group=1, head_dim=head_dim, dtype=dtype, seed=3)
    with pytest.raises(ValueError, match=named):
        decode(case, num_splits)
