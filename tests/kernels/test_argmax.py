import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.argmax import argmax_rows, argmax_rows_reference


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 5]),
    vocab=st.sampled_from([1, 7, 2048, 2049, 32003]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_torch(rows: int, vocab: int, dtype: torch.dtype, levels: int, seed: int) -> None:
    torch.manual_seed(seed)
    # Few levels: many ties, of which the lowest token wins.
    logits = (torch.randint(-levels, levels, (rows, vocab + 5)) / levels).to(dtype)[:, :vocab]
    tokens = argmax_rows(logits)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == argmax_rows_reference(logits).tolist()


def test_many_rows_are_not_split() -> None:
    logits = torch.randn(600, 50)
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))


def test_what_is_no_number_never_wins() -> None:
    logits = torch.full((3, 5000), -torch.inf)
    logits[0, 4000], logits[1, 10] = -5.0, torch.nan
    logits[2, 4999], logits[2, 3] = 3.0, torch.nan
    assert argmax_rows(logits).tolist() == [4000, 0, 4999]


def test_a_type_that_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        argmax_rows(torch.zeros(1, 4).double())
