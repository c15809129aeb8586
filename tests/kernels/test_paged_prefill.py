import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.paged_kv import TOLERANCE
from splitserve_kernels.paged_prefill import paged_prefill, paged_prefill_reference

from .paged_cases import make_case, worst_error

# (tokens in the cache before the chunk, tokens of the chunk)
RAGGED = [(0, 1), (0, 16), (16, 33), (31, 1), (100, 130)]


def check(chunks: list[tuple[int, int]], *, dtype: torch.dtype, seed: int, **shape: int) -> None:
    counts = [count for _, count in chunks]
    lengths = [past + count for past, count in chunks]
    # The first two rows and the last one are nobody's.
    case = make_case(lengths, rows=sum(counts) + 3, dtype=dtype, seed=seed, **shape)
    starts = torch.tensor([2, *counts]).cumsum(0)
    fixed = (case.queries, case.keys, case.values, case.page_table, starts, case.lengths)
    out = case.poisoned_out
    paged_prefill(*fixed, out, max_queries=max(counts))
    exact = paged_prefill_reference(*fixed)
    assert worst_error(out[2:-1], exact[2:-1]) <= TOLERANCE[dtype]
    assert out[[0, 1, -1]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_ragged_chunks(dtype: torch.dtype, head_dim: int, group: int) -> None:
    check(RAGGED, dtype=dtype, seed=group + head_dim, kv_heads=2, group=group, head_dim=head_dim)


@settings(max_examples=12, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 150)), min_size=1, max_size=3),
    block_tokens=st.sampled_from([4, 16, 24]),
    head_dim=st.sampled_from([8, 80, 256]),
    group=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_geometry(
    chunks: list[tuple[int, int]], block_tokens: int, head_dim: int, group: int, seed: int
) -> None:
    shape = {"kv_heads": 1, "group": group, "head_dim": head_dim, "block_tokens": block_tokens}
    check(chunks, dtype=torch.float32, seed=seed, **shape)


def test_what_cannot_be_computed_is_refused() -> None:
    case = make_case([5], rows=5, kv_heads=1, group=1, head_dim=64, dtype=torch.half, seed=1)
    keys, values = case.keys[..., :32], case.values[..., :32]
    fixed = (case.queries, keys, values, case.page_table, torch.tensor([0, 5]), case.lengths)
    with pytest.raises(ValueError, match="do not go together"):
        paged_prefill(*fixed, case.poisoned_out, max_queries=5)
