"""The arithmetic, with several ranks' memory in one process and nobody waiting.

`tests/gpu/test_all_reduce.py` has the waiting.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.all_reduce import (
    all_reduce,
    all_reduce_add_norm,
    all_reduce_add_norm_reference,
    all_reduce_reference,
    takes,
    takes_rows,
)
from splitserve_kernels.norm import NormKind
from splitserve_kernels.peer_memory import BLOCK_BYTES, MOST_BYTES, MOST_PROGRAMS, PeerMemory
from torch import Tensor

from splitserve.models.config import NormConfig
from splitserve.models.decoder import Residual
from splitserve.models.triton_backend import TritonNorm

EPS = 1e-5
PROGRAMS = 3
# The interpreter cuts bfloat16 off where a GPU rounds; `tests/gpu/test_all_reduce.py` checks it.
DTYPES = [torch.float32, torch.float16]
# One unit in the last place where the order of a sum of fp32 tipped a rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9}
# Of fewer numbers one rounding that tipped is more than the share that `assert_close` allows.
ENOUGH = 512

T = TypeVar("T")


class Ranks:
    """Each rank's block, all bytes 0xFF at first: NaN in any float."""

    def __init__(self, size: int) -> None:
        self.blocks = torch.full((size, BLOCK_BYTES), 0xFF, dtype=torch.uint8)
        addresses = tuple(block.data_ptr() for block in self.blocks)
        self.peers = [
            PeerMemory(rank, addresses, torch.zeros(PROGRAMS, dtype=torch.int64), 60.0)
            for rank in range(size)
        ]

    def last(self, rank: int, call: Callable[[PeerMemory], T]) -> T:
        """What `call` gives on `rank`, launched after all others' have left their rows."""
        size = len(self.peers)
        for other in range(rank + 1, rank + size):
            call(self.peers[other % size])
        return call(self.peers[rank])


def parts_of(size: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(size)]


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Within a rounding, and mostly without any."""
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=TOLERANCE[out.dtype], atol=1e-6)
    if out.dtype is not torch.float32:
        assert (out == expected).float().mean() > 0.99


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_like(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@settings(max_examples=4, deadline=None)
@given(
    shape=st.sampled_from([(1,), (3, 7), (1, 129), (15, 576), (2, 3, 65), (5, 4096)]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sum_is_in_the_order_of_ranks(
    size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    ranks = Ranks(size)
    for rank in (0, seed % size):
        parts = parts_of(size, *shape, dtype=dtype)
        before = [part.clone() for part in parts]
        total = ranks.last(rank, lambda peers, parts=parts: all_reduce(parts[peers.rank], peers))
        assert torch.equal(total, all_reduce_reference(parts))
        assert all(map(torch.equal, parts, before))


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@settings(max_examples=4, deadline=None)
@given(
    rows=st.integers(1, 7),
    width=st.sampled_from([33, 64, 129, 576, 1536]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["rms", "layer"]),
    wide=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_with_residual_and_norm(
    size: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    kind: NormKind,
    wide: bool,
    biased: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = max(rows, -(-ENOUGH // width))
    ranks = Ranks(size)
    weight_type = torch.float32 if wide else dtype
    weight = (1 + torch.randn(width)).to(weight_type)
    bias = torch.randn(width).to(weight_type) if biased and kind == "layer" else None
    how: Any = {"kind": kind, "wide_weight": wide}
    for rank in (0, seed % size):
        parts = parts_of(size, rows, width, dtype=dtype)
        residual = torch.randn(rows, 2 * width).to(dtype)[:, width:]

        def call(
            peers: PeerMemory, parts: list[Tensor] = parts, residual: Tensor = residual
        ) -> tuple[Tensor, Tensor]:
            return all_reduce_add_norm(parts[peers.rank], residual, weight, bias, EPS, peers, **how)

        total, normed = ranks.last(rank, call)
        right = all_reduce_add_norm_reference(parts, residual, weight, bias, EPS, **how)
        assert torch.equal(total, right[0])
        assert_close(normed, right[1])


def test_a_layer_norm_may_go_without_a_weight() -> None:
    ranks, parts = Ranks(2), parts_of(2, 3, 100, dtype=torch.float32)
    how: Any = {"kind": "layer", "wide_weight": False}
    found = ranks.last(
        0, lambda p: all_reduce_add_norm(parts[p.rank], parts[1], None, None, EPS, p, **how)
    )
    right = all_reduce_add_norm_reference(parts, parts[1], None, None, EPS, **how)
    assert torch.equal(found[0], right[0])
    assert_close(found[1], right[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 4096])
def test_the_longest_message_fills_a_half_and_no_more(dtype: torch.dtype, width: int) -> None:
    """Also more rows than programs, and one more row that is refused."""
    ranks, rows = Ranks(2), MOST_BYTES // dtype.itemsize // width
    parts = parts_of(2, rows, width, dtype=dtype)
    weight = torch.ones(width, dtype=dtype)
    how: Any = {"kind": "rms", "wide_weight": False}
    total = ranks.last(1, lambda peers: all_reduce(parts[peers.rank], peers))
    assert torch.equal(total, all_reduce_reference(parts))
    halves = ranks.blocks[:, : 2 * MOST_BYTES].view(2, 2, MOST_BYTES)
    # The first launch is number 1; the other half and the signals are as they were.
    assert torch.equal(halves[:, 1].view(dtype), torch.stack(parts).view(2, -1))
    assert (halves[:, 0] == 0xFF).all()
    assert (ranks.blocks[:, 2 * MOST_BYTES :] == 0xFF).all()
    fused = ranks.last(
        1, lambda p: all_reduce_add_norm(parts[p.rank], parts[0], weight, None, EPS, p, **how)
    )
    right = all_reduce_add_norm_reference(parts, parts[0], weight, None, EPS, **how)
    assert torch.equal(fused[0], right[0])
    assert_close(fused[1], right[1])
    assert torch.equal(halves[:, 0].view(dtype), torch.stack(parts).view(2, -1))
    with pytest.raises(ValueError, match="cannot be summed"):
        all_reduce(torch.zeros(rows + 1, width, dtype=dtype), ranks.peers[0])


def test_every_program_counts_every_launch() -> None:
    """Whatever the number of rows: launches of other shapes must find the same half."""
    ranks = Ranks(2)
    for launch, rows in enumerate((1, 300, 2, 17), start=1):
        all_reduce(torch.zeros(rows, 400), ranks.peers[0])
        assert (ranks.peers[0].epochs == launch).all()
        assert (ranks.peers[1].epochs == 0).all()


def test_a_row_of_nan_stays_with_itself() -> None:
    ranks, parts = Ranks(2), parts_of(2, 3, 40, dtype=torch.float32)
    parts[1][1, 5] = torch.nan
    how: Any = {"kind": "rms", "wide_weight": False}
    total, normed = ranks.last(
        0,
        lambda p: all_reduce_add_norm(parts[p.rank], parts[0], torch.ones(40), None, EPS, p, **how),
    )
    assert total.isnan().sum() == 1
    assert normed[1].isnan().all()
    assert normed[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "residual", "weight", "kind", "named"),
    [
        (torch.zeros(2, 20000), torch.zeros(2, 20000), torch.zeros(20000), "rms", "20000"),
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), "rms", "residual"),
        (torch.zeros(2, 8), torch.zeros(2, 8).half(), torch.zeros(8), "rms", "residual"),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(9), "rms", "shape"),
        (torch.zeros(2, 8), torch.zeros(2, 8), None, "rms", "RMS norm"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), torch.zeros(8), "rms", "cannot"),
        (torch.zeros(2, 8).double(), torch.zeros(2, 8).double(), None, "layer", "float64"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    x: Tensor, residual: Tensor, weight: Tensor | None, kind: NormKind, named: str
) -> None:
    peers = Ranks(2).peers[0]
    with pytest.raises(ValueError, match=named):
        all_reduce_add_norm(x, residual, weight, None, EPS, peers, kind=kind, wide_weight=False)


def test_what_is_taken() -> None:
    assert takes(torch.zeros(3, 3, 3))
    assert not takes(torch.zeros(0, 8))
    assert not takes(torch.zeros(8, dtype=torch.int32))
    assert not takes_rows(torch.zeros(3, 3, 3))
    assert not takes_rows(torch.zeros(1, 20000))


def test_memory_that_does_not_fit_is_refused() -> None:
    peers = Ranks(2).peers[0]
    for addresses in (peers.addresses[:1], peers.addresses[:1] * 9):
        with pytest.raises(ValueError, match="ranks"):
            dataclasses.replace(peers, addresses=addresses)
    for programs in (0, MOST_PROGRAMS + 1):
        with pytest.raises(ValueError, match="programs"):
            dataclasses.replace(peers, epochs=torch.zeros(programs, dtype=torch.int64))
    with pytest.raises(ValueError, match="aligned"):
        dataclasses.replace(peers, addresses=(peers.addresses[0], peers.addresses[1] + 8))


class Lender:
    """A group whose kernels sum by themselves where `lends`."""

    def __init__(self, peers: PeerMemory, parts: list[Tensor], *, lends: bool) -> None:
        self.rank, self.size = peers.rank, peers.ranks
        self.summed = 0
        self._peers, self._parts, self._lends = peers, parts, lends

    def peers(self, x: Tensor) -> PeerMemory | None:
        assert x is self._parts[self.rank]
        return self._peers if self._lends else None

    def all_reduce(self, x: Tensor) -> Tensor:
        self.summed += 1
        return all_reduce_reference(self._parts)


@pytest.mark.parametrize("lends", [False, True])
def test_a_norm_of_the_stream_sums_with_the_peers_that_it_is_lent(lends: bool) -> None:
    ranks, parts = Ranks(2), parts_of(2, 3, 64, dtype=torch.float16)
    x, weight = torch.randn(3, 64).half(), torch.randn(64).half()
    norm = TritonNorm(NormConfig("rms", EPS), weight, None, codes=False)

    def call(peers: PeerMemory) -> tuple[Tensor, Any, int]:
        group = Lender(peers, parts, lends=lends)
        return *Residual(x, parts[peers.rank], group).read(norm), group.summed

    total, normed, summed = ranks.last(1, call)
    right = all_reduce_add_norm_reference(
        parts, x, weight, None, EPS, kind="rms", wide_weight=False
    )
    assert torch.equal(total, right[0])
    assert_close(normed, right[1])
    assert summed == (not lends)


def test_a_norm_to_codes_sums_before_it() -> None:
    ranks, parts = Ranks(2), parts_of(2, 3, 64, dtype=torch.float16)
    group = Lender(ranks.peers[0], parts, lends=True)
    norm = TritonNorm(NormConfig("rms", EPS), torch.ones(64).half(), None, codes=True)
    x = torch.randn(3, 64).half()
    total, _ = Residual(x, parts[0], group).read(norm)
    assert torch.equal(total, x + all_reduce_reference(parts))
    assert group.summed == 1


def test_without_a_norm_the_stream_is_summed_once() -> None:
    ranks, parts = Ranks(2), parts_of(2, 3, 64, dtype=torch.float32)
    group = Lender(ranks.peers[0], parts, lends=True)
    total, same = Residual(parts[1], parts[0], group).read(None)
    assert total is same
    assert torch.equal(total, parts[1] + all_reduce_reference(parts))
    assert group.summed == 1
