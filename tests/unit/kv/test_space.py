"""The allocator of the arena against a model that knows every page's owner."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore.space import PAGE_BYTES, Extent, Space, round_up

PAGES = 64


@pytest.mark.parametrize(("size", "rounded"), [(1, 4096), (4096, 4096), (4097, 8192)])
def test_sizes_are_whole_pages(size, rounded):
    assert round_up(size) == rounded
    assert Space(1 << 20).allocate(size) == Extent(0, rounded)


@pytest.mark.parametrize("size", [0, -1, -5000])
def test_a_size_is_positive(size):
    with pytest.raises(ValueError, match="positive"):
        Space(1 << 20).allocate(size)


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_an_arena_is_whole_pages(size):
    with pytest.raises(ValueError, match="multiple"):
        Space(size)


def test_takes_the_tightest_fit():
    space = Space(10 * PAGE_BYTES)
    pages = [space.allocate(size * PAGE_BYTES) for size in (3, 1, 2, 1, 3)]
    space.release(pages[0])
    space.release(pages[2])
    assert space.allocate(2 * PAGE_BYTES) == pages[2]
    assert space.allocate(4 * PAGE_BYTES) is None
    assert space.allocate(3 * PAGE_BYTES) == pages[0]


def test_neighbours_join_on_both_sides():
    space = Space(3 * PAGE_BYTES)
    left, middle, right = (space.allocate(PAGE_BYTES) for _ in range(3))
    space.release(left)
    space.release(right)
    assert len(space.free_extents()) == 2
    space.release(middle)
    assert space.free_extents() == [Extent(0, 3 * PAGE_BYTES)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12 * PAGE_BYTES), st.integers(0, 99))))
def test_no_overlap_no_leak_and_always_joined(steps):
    space, live, owner = Space(PAGES * PAGE_BYTES), [], [False] * PAGES
    for give_back, size, pick in steps:
        if give_back and live:
            extent = live.pop(pick % len(live))
            space.release(extent)
            mark(owner, extent, False)
        else:
            extent = space.allocate(size)
            if extent is None:
                assert longest_run(owner) * PAGE_BYTES < size
                continue
            mark(owner, extent, True)
            live.append(extent)
        free = space.free_extents()
        assert space.free_bytes == owner.count(False) * PAGE_BYTES
        assert sum(extent.size_bytes for extent in free) == space.free_bytes
        assert all(one.end < other.offset for one, other in pairwise(free))
    for extent in live:
        space.release(extent)
    assert space.free_extents() == [Extent(0, PAGES * PAGE_BYTES)]


def mark(owner, extent, taken):
    for page in range(extent.offset // PAGE_BYTES, extent.end // PAGE_BYTES):
        assert owner[page] is not taken
        owner[page] = taken


def longest_run(owner):
    text = "".join("#" if taken else "." for taken in owner)
    return max(map(len, text.split("#")))
