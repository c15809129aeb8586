"""The page pool against a model of itself."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from splitserve.kv.pool import PagePool, PoolFull


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_allocates_every_page_once_and_then_refuses() -> None:
    pool = PagePool(3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    with pytest.raises(PoolFull):
        pool.allocate(1)


def test_refused_allocation_takes_nothing() -> None:
    pool = PagePool(3)
    with pytest.raises(PoolFull):
        pool.allocate(4)
    assert pool.num_free == 3


def test_match_stops_at_the_first_gap() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    pool.register(pages[0], key(0))
    pool.register(pages[2], key(2))
    assert pool.match([key(0), key(1), key(2)]) == [pages[0]]


def test_a_freed_prefix_can_be_matched_until_it_is_evicted() -> None:
    pool = PagePool(2)
    pages = pool.allocate(2)
    for index, page in enumerate(pages):
        pool.register(page, key(index))
    pool.free(pages)
    assert pool.match([key(0), key(1)]) == pages
    pool.free(pages)
    assert pool.allocate(1) == [pages[1]], "the tail of a prefix is evicted before its head"
    assert pool.match([key(0), key(1)]) == [pages[0]]


def test_second_page_of_a_key_is_not_cached() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.register(first, key(7))
    pool.register(second, key(7))
    pool.free([first, second])
    assert pool.match([key(7)]) == [first]
    pool.check()


def test_reports_what_was_added_and_removed() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.register(pages[0], key(1))
    pool.free(pages)
    assert pool.drain_changes() == ([key(1)], [])
    pool.allocate(1)
    assert pool.drain_changes() == ([], [key(1)])


def test_without_reuse_nothing_is_cached() -> None:
    pool = PagePool(1, reuse=False)
    pages = pool.allocate(1)
    pool.register(pages[0], key(1))
    pool.free(pages)
    assert pool.match([key(1)]) == []


def test_freeing_twice_is_refused() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(pages)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes and go; a page is never given to two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.sequences: list[tuple[list[int], list[bytes]]] = []
        self.content: dict[int, bytes] = {}

    @rule(family=st.integers(0, 2), length=st.integers(1, 5))
    def arrive(self, family: int, length: int) -> None:
        keys = [key(family * 100 + index) for index in range(length)]
        cached = self.pool.match(keys)
        for page, cached_key in zip(cached, keys, strict=False):
            assert self.content[page] == cached_key
        try:
            fresh = self.pool.allocate(length - len(cached))
        except PoolFull:
            self.pool.free(cached)
            return
        held = {page for pages, _ in self.sequences for page in pages}
        assert not held & set(fresh)
        pages = cached + fresh
        for page, page_key in zip(pages, keys, strict=True):
            self.content[page] = page_key
            self.pool.register(page, page_key)
        self.sequences.append((pages, keys))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.sequences:
            index = data.draw(st.integers(0, len(self.sequences) - 1))
            pages, _ = self.sequences.pop(index)
            self.pool.free(pages)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        self.pool.check()
        held = {page for pages, _ in self.sequences for page in pages}
        assert self.pool.num_free == self.pool.num_pages - len(held)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
