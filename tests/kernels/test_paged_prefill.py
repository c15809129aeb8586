import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.paged_kv import CODE_TYPES, TOLERANCE
from splitserve_kernels.paged_prefill import paged_prefill, paged_prefill_reference
from torch import Tensor

from .paged_cases import PagedCase, learned, make_case, worst_error

# (tokens in the cache before the chunk, tokens of the chunk)
RAGGED = [(0, 1), (0, 16), (16, 33), (31, 1), (100, 130)]
HEADS = 4
RULES = [
    {"scale": 0.3},
    {"window": 20},
    {"window": 100},
    {"soft_cap": 2.0},
    {"slopes": learned(HEADS, 1).abs() / 8},
    {"sinks": learned(HEADS, 2) * 3},
    {
        "scale": 0.4,
        "window": 70,
        "soft_cap": 3.0,
        "slopes": learned(HEADS, 3).abs() / 8,
        "sinks": learned(HEADS, 4),
    },
]


def chunk_rows(
    case: PagedCase, pool: Tensor, chunks: list[tuple[int, int]], first: int = 2
) -> Tensor:
    """What the pool has of the chunks, row by row from `first` on, NaN in rows of nobody."""
    block = pool.shape[1]
    rows = torch.full((case.queries.shape[0], *pool.shape[2:]), float("nan"), dtype=pool.dtype)
    at = first
    for table, (past, count) in zip(case.page_table, chunks, strict=True):
        tokens = torch.arange(past, past + count)
        rows[at : at + count] = pool[table[tokens // block].long(), tokens % block]
        at += count
    return rows


def check(
    chunks: list[tuple[int, int]],
    *,
    dtype: torch.dtype,
    seed: int,
    rules: dict[str, object] | None = None,
    gives_new: bool = False,
    codes: torch.dtype | None = None,
    **shape: int,
) -> None:
    counts = [count for _, count in chunks]
    lengths = [past + count for past, count in chunks]
    rules = rules or {}
    window = rules.get("window") or 1000
    # The first two rows and the last one are nobody's.
    case = make_case(
        lengths,
        rows=sum(counts) + 3,
        dtype=dtype,
        seed=seed,
        codes=codes,
        unread=[max(0, past + 1 - window) for past, _ in chunks],
        **shape,
    )
    starts = torch.tensor([2, *counts]).cumsum(0)
    fixed = (*case.fixed[:4], starts, case.lengths)
    rules = {**rules, **case.scales}
    new = {}
    if gives_new and codes is None:
        new["new_keys"] = chunk_rows(case, case.keys, chunks)
        new["new_values"] = chunk_rows(case, case.values, chunks)
    out = case.poisoned_out
    paged_prefill(*fixed, out, **new, **rules)
    exact = paged_prefill_reference(*fixed, **rules)
    assert worst_error(out[2:-1], exact[2:-1]) <= TOLERANCE[dtype]
    assert out[[0, 1, -1]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (128, 3), (96, 4), (64, 8)])
@pytest.mark.parametrize("gives_new", [False, True])
def test_ragged_chunks(dtype: torch.dtype, head_dim: int, group: int, gives_new: bool) -> None:
    shape = {"kv_heads": 2, "group": group, "head_dim": head_dim}
    check(RAGGED, dtype=dtype, seed=group + head_dim, gives_new=gives_new, **shape)


@pytest.mark.parametrize("codes", [None, *CODE_TYPES])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_rules(rules: dict[str, object], codes: torch.dtype | None) -> None:
    shape = {"kv_heads": 2, "group": HEADS // 2, "head_dim": 32}
    fixed = {"dtype": torch.float32, "seed": 1, "gives_new": True}
    check(RAGGED, rules=rules, codes=codes, **fixed, **shape)


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("codes", CODE_TYPES)
def test_codes_of_8_bits(head_dim: int, codes: torch.dtype) -> None:
    shape = {"kv_heads": 2, "group": 2, "head_dim": head_dim}
    check(RAGGED, dtype=torch.float16, seed=head_dim, codes=codes, **shape)


@settings(max_examples=12, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=4),
    block_tokens=st.sampled_from([4, 16, 24]),
    head_dim=st.sampled_from([8, 80, 128]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    codes=st.sampled_from([None, *CODE_TYPES]),
    window=st.none() | st.integers(1, 250),
    has_sinks=st.booleans(),
    gives_new=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_geometry(
    chunks: list[tuple[int, int]],
    block_tokens: int,
    head_dim: int,
    kv_heads: int,
    group: int,
    codes: torch.dtype | None,
    window: int | None,
    has_sinks: bool,
    gives_new: bool,
    seed: int,
) -> None:
    chunks = [*chunks, (3, 2)]
    sinks = learned(kv_heads * group, seed) if has_sinks else None
    check(
        chunks,
        dtype=torch.float32,
        seed=seed,
        rules={"window": window, "sinks": sinks},
        codes=codes,
        gives_new=gives_new,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_tokens=block_tokens,
    )


def test_what_cannot_be_computed_is_refused() -> None:
    case = make_case([5], rows=5, kv_heads=1, group=1, head_dim=64, dtype=torch.half, seed=1)
    keys, values = case.keys[..., :32], case.values[..., :32]
    fixed = (case.queries, keys, values, case.page_table, torch.tensor([0, 5]), case.lengths)
    with pytest.raises(ValueError, match="do not go together"):
        paged_prefill(*fixed, case.poisoned_out)


def test_what_is_not_a_number_in_one_sequence_is_its_own() -> None:
    chunks = [(0, 33), (7, 20), (0, 70)]
    counts = [count for _, count in chunks]
    shape = {"rows": sum(counts), "kv_heads": 1, "group": 2, "head_dim": 64}
    case = make_case([sum(chunk) for chunk in chunks], dtype=torch.float16, seed=5, **shape)
    starts = torch.tensor([0, *counts]).cumsum(0)
    fixed = (*case.fixed[:4], starts, case.lengths)
    new_keys, new_values = (
        chunk_rows(case, pool, chunks, first=0) for pool in (case.keys, case.values)
    )
    new_values[counts[0] : counts[0] + counts[1]] = torch.nan
    out = case.poisoned_out
    paged_prefill(*fixed, out, new_keys=new_keys, new_values=new_values)
    exact = paged_prefill_reference(*fixed)
    for first, end in ((0, counts[0]), (sum(counts[:2]), sum(counts))):
        assert worst_error(out[first:end], exact[first:end]) <= TOLERANCE[torch.float16]
    assert not out[counts[0] : sum(counts[:2])].isfinite().all()
