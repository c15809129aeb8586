"""Three ranks as threads of this process: more than two, so that an order of adding shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from splitserve.errors import Unavailable
from splitserve.parallel.gloo_group import GlooGroup
from splitserve.parallel.group import Group, SingleGroup
from splitserve.parallel.rendezvous import LOOPBACK

SIZE = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ranks:
    def __init__(self, folder: Path, recorded: Any) -> None:
        self.recorded = recorded
        self._folder = folder
        self._threads = ThreadPoolExecutor(SIZE)
        self.groups = list(self._threads.map(self._join, range(SIZE), timeout=20))

    def each(self, act: Callable[[Group, int], Tensor]) -> list[Tensor]:
        """What every rank gets."""
        return list(self._threads.map(act, self.groups, range(SIZE), timeout=20))

    def close(self) -> None:
        for group in self.groups:
            group.close()
        self._threads.shutdown()

    def _join(self, rank: int) -> GlooGroup:
        store = FileStore(str(self._folder / "store"), SIZE)
        return GlooGroup(store, rank, SIZE, self.recorded.ending, host=LOOPBACK)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, recorded: Any) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), recorded)
    yield ranks
    ranks.close()


def values(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(64, 40, generator=generator)[:rows].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ranks_get_the_same_bits(ranks: Ranks, dtype: torch.dtype) -> None:
    expected = sum(values(rank, 64, dtype).float() for rank in range(SIZE))
    assert isinstance(expected, Tensor)
    for total in ranks.each(lambda group, rank: group.all_reduce(values(rank, 64, dtype))):
        assert total.dtype == dtype
        assert torch.equal(total, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_other_rows(ranks: Ranks, dtype: torch.dtype) -> None:
    whole = ranks.each(lambda group, rank: group.all_reduce(values(rank, 64, dtype)))[0]
    for rows in (1, 2, 7, 33):
        some = ranks.each(lambda group, rank, n=rows: group.all_reduce(values(rank, n, dtype)))
        assert torch.equal(some[1], whole[:rows])


def test_columns_are_gathered_in_the_order_of_ranks(ranks: Ranks) -> None:
    parts = [values(rank, 5, torch.bfloat16) for rank in range(SIZE)]
    for gathered in ranks.each(lambda group, rank: group.all_gather_columns(parts[rank])):
        assert torch.equal(gathered, torch.cat(parts, 1))


def test_a_view_can_be_gathered(ranks: Ranks) -> None:
    parts = [values(rank, 8, torch.float32).t() for rank in range(SIZE)]
    for gathered in ranks.each(lambda group, rank: group.all_gather_columns(parts[rank])):
        assert torch.equal(gathered, torch.cat(parts, 1))


def test_broadcast_is_of_rank_0(ranks: Ranks) -> None:
    for value in ranks.each(lambda group, rank: group.broadcast(torch.tensor([rank + 7]))):
        assert value.tolist() == [7]


def test_works_in_inference_mode(ranks: Ranks) -> None:
    def act(group: Group, rank: int) -> Tensor:
        with torch.inference_mode():
            return group.all_reduce(torch.ones(2, 2))

    assert all(torch.equal(total, torch.full((2, 2), 3.0)) for total in ranks.each(act))


def test_a_rank_that_leaves_fails_the_others(tmp_path: Path, make_recorded: Any) -> None:
    recorded = make_recorded()
    recorded.ending.expect()  # so that the thread goes on, with an error
    ranks = Ranks(tmp_path, recorded)
    ranks.groups[2].close()
    del ranks.groups[2]
    with pytest.raises(Unavailable):
        ranks.groups[0].all_reduce(torch.ones(3))
    ranks.close()


def test_a_group_of_one_exchanges_nothing() -> None:
    group: Group = SingleGroup()
    x = torch.ones(2)
    assert group.all_reduce(x) is group.all_gather_columns(x) is group.broadcast(x) is x
    group.close()
