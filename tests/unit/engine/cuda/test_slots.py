"""What the device is told of pages, and that it is told once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.protocol import Slice

CPU = torch.device("cpu")
BLOCK, SLOTS, MOST = 4, 3, 12


class Sequence:
    """Pages that grow as its tokens need them, in one list as the scheduler's."""

    def __init__(self, first_page: int) -> None:
        self.pages = [first_page]
        self.length = 1

    def grow(self, count: int) -> None:
        self.length = min(self.length + count, MOST * BLOCK)
        while len(self.pages) * BLOCK < self.length:
            self.pages.append(self.pages[0] + len(self.pages))

    def last(self, slot: int) -> Slice:
        return Slice([5], self.length - 1, self.pages, (), slot)


def tell(table: SlotTable, slices: list[Slice]) -> int:
    """How many pages; the launch that places them is tested in `tests/kernels`."""
    news = table.news(slices, BLOCK)
    table.pages.view(-1)[news.places] = torch.tensor(news.page_numbers, dtype=torch.int32)
    return len(news.places)


@given(
    st.lists(
        st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 9), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_the_table_has_every_sequences_pages(turns: list[tuple[int, int, bool]]) -> None:
    """Sequences grow, end and are followed by others in their slots."""
    table = SlotTable(SLOTS, MOST, CPU)
    sequences = [Sequence(100 * slot) for slot in range(SLOTS)]
    for turn, (slot, count, is_new) in enumerate(turns):
        if is_new:
            sequences[slot] = Sequence(1000 * (turn + 1))
        sequence = sequences[slot]
        sequence.grow(count)
        tell(table, [sequence.last(slot)])
        needed = -(-sequence.length // BLOCK)
        assert table.pages[slot, :needed].tolist() == sequence.pages[:needed]


def test_a_page_is_told_once() -> None:
    table, sequence = SlotTable(SLOTS, MOST, CPU), Sequence(7)
    sequence.grow(9)
    assert tell(table, [sequence.last(1)]) == 3
    assert tell(table, [sequence.last(1)]) == 0
    sequence.grow(3)
    assert tell(table, [sequence.last(1)]) == 1


def test_equal_pages_of_another_sequence_are_told_again() -> None:
    table, first, second = SlotTable(SLOTS, MOST, CPU), Sequence(7), Sequence(7)
    assert tell(table, [first.last(0)]) == 1
    assert tell(table, [second.last(0)]) == 1


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    """On the device it would write into the next slot's pages."""
    table = SlotTable(SLOTS, MOST, CPU)
    room = table.pages.shape[1]
    assert room >= MOST
    pages = list(range(room + 1))
    assert tell(table, [Slice([5], room * BLOCK - 1, pages, (), 0)]) == room
    with pytest.raises(ValueError, match="more than the context"):
        table.news([Slice([5], room * BLOCK, pages, (), 0)], BLOCK)
