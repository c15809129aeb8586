from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import ConfigError
from splitserve.parallel.shard import Shard

SIZES = st.integers(1, 16)


def ranks(size: int) -> list[Shard]:
    return [Shard(rank, size) for rank in range(size)]


def joined(parts: list[range]) -> list[int]:
    return [each for part in parts for each in part]


@given(SIZES, st.integers(1, 64))
def test_spans_are_equal_and_in_order(size: int, part: int) -> None:
    spans = [shard.span(size * part, "rows") for shard in ranks(size)]
    assert joined(spans) == list(range(size * part))
    assert {len(span) for span in spans} == {part}


@given(SIZES, st.integers(0, 200))
def test_padded_spans_have_the_real_rows_first(size: int, count: int) -> None:
    shards = ranks(size)
    padded: list[int | None] = []
    for shard in shards:
        rows = list(shard.padded_span(count))
        padded += [*rows, *[None] * (shard.padded_width(count) - len(rows))]
    assert padded[:count] == list(range(count))
    assert set(padded[count:]) <= {None}


@given(SIZES, st.integers(0, 200))
def test_shares_are_even(size: int, count: int) -> None:
    shares = [shard.share(count) for shard in ranks(size)]
    assert joined(shares) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3))
def test_query_heads_read_the_ranks_own_kv_heads(size: int, kv: int, group: int) -> None:
    size, kv = 2**size, 2**kv
    heads = max(size, kv) * 2**group
    for shard in ranks(size):
        read = {head * kv // heads for head in shard.query_heads(heads, kv)}
        assert read == set(shard.kv_heads(kv))


def test_few_kv_heads_are_replicated() -> None:
    assert [list(shard.kv_heads(2)) for shard in ranks(4)] == [[0], [0], [1], [1]]
    assert Shard(0, 4).kv_replicas(2) == 2
    assert Shard(0, 4).kv_replicas(8) == 1


def test_one_rank_has_everything() -> None:
    assert Shard().query_heads(9, 3) == range(9)
    assert Shard().padded_span(49152) == range(49152)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: Shard(0, 2).query_heads(9, 4),
            "num_heads 9 does not divide by tensor_parallel_size 2",
        ),
        (
            lambda: Shard(0, 2).query_heads(9, 3),
            "num_kv_heads 3 does not divide by tensor_parallel_size 2",
        ),
        (
            lambda: Shard(0, 4).kv_heads(3),
            "num_kv_heads 3 does not divide tensor_parallel_size 4",
        ),
        (
            lambda: Shard(1, 2).span(11, "intermediate_size"),
            "intermediate_size 11 does not divide by tensor_parallel_size 2",
        ),
        (
            lambda: Shard(1, 2).span(96, "intermediate_size", multiple=32),
            "intermediate_size 96 does not divide by tensor_parallel_size 2 into multiples of 32",
        ),
        (lambda: Shard(0, 0), "tensor_parallel_size 0 must be at least 1"),
        (lambda: Shard(2, 2), "rank 2 is outside tensor_parallel_size 2: ranks are 0 to 1"),
    ],
)
def test_what_does_not_divide_is_named(call: object, line: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.message == line
