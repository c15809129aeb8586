import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.paged_decode import paged_decode, paged_decode_reference, plan_decode
from splitserve_kernels.paged_kv import CODE_TYPES, TOLERANCE

from .paged_cases import PagedCase, learned, make_case, worst_error

RAGGED = [1, 0, 16, 17, 64, 65, 300]
HEADS = 8
# Each rule alone, and all at once.
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


def decode(case: PagedCase, processors: int, **rules: object) -> torch.Tensor:
    out, kv_heads = case.poisoned_out, case.keys.shape[2]
    plan = plan_decode(
        case.lengths, kv_heads=kv_heads, num_processors=processors, window=rules.get("window")
    )
    for _ in range(2):
        # A plan serves all layers: the first launch leaves it as it was.
        paged_decode(*case.fixed, out, plan=plan, **rules, **case.scales)
    assert plan.arrivals.eq(0).all()
    return out


def check(case: PagedCase, processors: int, **rules: object) -> None:
    exact = paged_decode_reference(*case.fixed, **rules, **case.scales)
    assert worst_error(decode(case, processors, **rules), exact) <= TOLERANCE[case.queries.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (128, 3), (96, 4), (64, 20)])
@pytest.mark.parametrize("processors", [1, 4])
def test_ragged_batch(dtype: torch.dtype, head_dim: int, group: int, processors: int) -> None:
    shape = {"rows": len(RAGGED), "kv_heads": 2, "group": group, "head_dim": head_dim}
    check(make_case(RAGGED, dtype=dtype, seed=group * head_dim, **shape), processors)


@pytest.mark.parametrize("codes", [None, *CODE_TYPES])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_rules(rules: dict[str, object], codes: torch.dtype | None) -> None:
    unread = [max(0, length - rules.get("window", 1000)) for length in RAGGED]
    case = make_case(
        RAGGED,
        rows=len(RAGGED),
        kv_heads=2,
        group=HEADS // 2,
        head_dim=64,
        dtype=torch.float32,
        seed=HEADS,
        codes=codes,
        unread=unread,
    )
    check(case, 3, **rules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("codes", CODE_TYPES)
def test_codes_of_8_bits(dtype: torch.dtype, head_dim: int, codes: torch.dtype) -> None:
    shape = {"rows": len(RAGGED), "kv_heads": 2, "group": 4, "head_dim": head_dim}
    check(make_case(RAGGED, dtype=dtype, seed=head_dim, codes=codes, **shape), 2)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    block_tokens=st.sampled_from([4, 16, 24]),
    head_dim=st.sampled_from([8, 80, 256]),
    kv_heads=st.integers(1, 3),
    table_dtype=st.sampled_from([torch.int32, torch.int64]),
    codes=st.sampled_from([None, *CODE_TYPES]),
    window=st.none() | st.integers(1, 250),
    has_sinks=st.booleans(),
    processors=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_geometry(
    lengths: list[int],
    block_tokens: int,
    head_dim: int,
    kv_heads: int,
    table_dtype: torch.dtype,
    codes: torch.dtype | None,
    window: int | None,
    has_sinks: bool,
    processors: int,
    seed: int,
) -> None:
    case = make_case(
        lengths,
        rows=len(lengths),
        kv_heads=kv_heads,
        group=2,
        head_dim=head_dim,
        dtype=torch.float32,
        seed=seed,
        codes=codes,
        unread=[max(0, length - (window or length)) for length in lengths],
        block_tokens=block_tokens,
        table_dtype=table_dtype,
    )
    sinks = learned(kv_heads * 2, seed) if has_sinks else None
    check(case, processors, window=window, sinks=sinks)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=40),
    kv_heads=st.integers(1, 8),
    window=st.none() | st.integers(1, 1000),
    processors=st.integers(1, 40),
)
def test_runs_begin_where_the_plan_says(
    lengths: list[int], kv_heads: int, window: int | None, processors: int
) -> None:
    plan = plan_decode(
        torch.tensor(lengths), kv_heads=kv_heads, num_processors=processors, window=window
    )
    # A line of (sequence, units before, tokens) for each unit, one for the time between included.
    line, before = [], 0
    for row, length in enumerate(lengths):
        origin = max(0, length - window) // 64 * 64 if window else 0
        units = max(1, -(-(length - origin) // 64)) + 1
        line += [(row, before, length)] * units * kv_heads
        before += units
    run = max(2, -(-len(line) // plan.programs))
    assert run <= plan.begins[0, 3] <= run + run // 16
    run = int(plan.begins[0, 3])
    begins = [program * run for program in range(plan.programs)]
    past_end = (len(lengths), before, 0)
    expected = [(*(line[at] if at < len(line) else past_end), run) for at in begins]
    assert [tuple(row) for row in plan.begins.tolist()] == expected
    assert plan.arrivals.eq(0).all()


def test_equal_sequences_are_not_shared_for_a_little_balance() -> None:
    lengths = torch.full((64,), 1024)
    plan = plan_decode(lengths, kv_heads=8, num_processors=132)
    assert plan.begins[0, 3] == 2 * (1024 // 64 + 1)
    lengths[0] += 640
    plan = plan_decode(lengths, kv_heads=8, num_processors=132)
    assert plan.begins[0, 3] == -(-8 * (64 * 17 + 10) // plan.programs)


def test_more_sequences_than_a_tile_of_the_plan_holds() -> None:
    lengths = torch.arange(2100) % 200
    plan = plan_decode(lengths, kv_heads=1, num_processors=2)
    units = ((lengths + 63) // 64).clamp_min(1) + 1
    begins = torch.arange(plan.programs) * plan.begins[0, 3]
    assert torch.equal(
        plan.begins[:, 0].long(), torch.searchsorted(units.cumsum(0), begins, right=True)
    )


@pytest.mark.parametrize("processors", [1, 5])
def test_a_sequence_of_no_tokens_gives_zeros(processors: int) -> None:
    shape = {"rows": 2, "kv_heads": 1, "group": 4, "head_dim": 64}
    out = decode(make_case([0, 70], dtype=torch.float32, seed=1, **shape), processors)
    assert out[0].eq(0).all()
    assert out[1].isfinite().all()


def test_a_score_far_above_the_others_takes_all() -> None:
    shape = {"rows": 1, "kv_heads": 1, "group": 1, "head_dim": 64}
    case = make_case([200], dtype=torch.float16, seed=2, **shape)
    case.keys[case.page_table[0, 9], 3, 0] = case.queries[0, 0] * 100
    assert torch.equal(decode(case, 4)[0, 0], case.values[case.page_table[0, 9], 3, 0])


def test_values_of_scale_zero_count_as_zeros() -> None:
    shape = {"rows": 1, "kv_heads": 1, "group": 1, "head_dim": 64}
    case = make_case([200], dtype=torch.float16, seed=2, codes=torch.int8, **shape)
    case.scales["value_scales"].zero_()
    assert decode(case, 4).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("head_dim", "dtype", "rules", "named"),
    [
        (64, torch.float64, {}, "float64"),
        (258, torch.float32, {}, "head_dim 258"),
        (64, torch.float32, {"scale": -1.0}, "scale is -1"),
        (64, torch.float32, {"soft_cap": 0.0}, "soft_cap is 0"),
        (64, torch.float32, {"window": 0}, "window is 0"),
        (64, torch.float32, {"sinks": torch.zeros(2)}, "sinks must be"),
        (64, torch.float32, {"key_scales": torch.zeros(1)}, "scales come with codes"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    head_dim: int, dtype: torch.dtype, rules: dict[str, object], named: str
) -> None:
    case = make_case([5], rows=1, kv_heads=1, group=1, head_dim=head_dim, dtype=dtype, seed=3)
    with pytest.raises(ValueError, match=named):
        decode(case, 1, **rules)


def test_a_plan_for_another_window_is_refused() -> None:
    shape = {"rows": 1, "kv_heads": 1, "group": 1, "head_dim": 64}
    case = make_case([5], dtype=torch.float32, seed=3, **shape)
    plan = plan_decode(case.lengths, kv_heads=1, num_processors=1, window=4)
    with pytest.raises(ValueError, match="window 4"):
        paged_decode(*case.fixed, case.poisoned_out, plan=plan)
