import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.kv_pages import (
    copy_pages,
    copy_pages_reference,
    pack_pages,
    pack_pages_reference,
    unpack_pages,
    unpack_pages_reference,
)
from torch import Tensor


def draw_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@settings(max_examples=30, deadline=None)
@given(
    page_bytes=st.sampled_from([48, 4096, 6 * 1024 + 4, 777, 40000]),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    unit=st.sampled_from([1, 4, 16]),
    count=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_there_and_back(
    page_bytes: int, bounds: tuple[float, float], unit: int, count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pool = draw_bytes(7, page_bytes)
    pages = torch.randperm(7)[:count]
    first, end = sorted(int(part * page_bytes) // unit * unit for part in bounds)
    out, expected = draw_bytes(count, end - first), draw_bytes(count, end - first)
    pack_pages(pool, pages, first, end, out)
    pack_pages_reference(pool, pages, first, end, expected)
    assert torch.equal(out, expected)

    rows = draw_bytes(count, end - first)
    filled = pool.clone()
    unpack_pages(pool, pages, first, end, rows)
    unpack_pages_reference(filled, pages, first, end, rows)
    assert torch.equal(pool, filled)


def test_rows_may_lie_in_something_wider() -> None:
    pool, wide = draw_bytes(4, 64), torch.zeros((2, 40), dtype=torch.uint8)
    pack_pages(pool, torch.tensor([3, 1]), 16, 48, wide[:, 8:])
    assert torch.equal(wide[:, 8:], pool[[3, 1], 16:48])
    assert wide[:, :8].eq(0).all()


@pytest.mark.parametrize(
    ("first", "end", "width", "named"),
    [(0, 65, 65, "of pages of 64"), (8, 4, 0, "of pages"), (0, 16, 8, "ranges of 16")],
)
def test_what_does_not_fit_is_refused(first: int, end: int, width: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack_pages(draw_bytes(4, 64), torch.tensor([0]), first, end, draw_bytes(1, width))


@settings(max_examples=20, deadline=None)
@given(
    page_bytes=st.sampled_from([48, 4096, 6 * 1024 + 4, 777, 40000]),
    count=st.integers(0, 5),
    programs=st.sampled_from([None, 1, 2, 7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pages_go_from_pool_to_pool(
    page_bytes: int, count: int, programs: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    source, target = draw_bytes(7, page_bytes), draw_bytes(5, page_bytes)
    expected = target.clone()
    theirs, own = torch.randint(0, 7, (count,)), torch.randperm(5)[:count]
    copy_pages(source, theirs, target, own, programs=programs)
    copy_pages_reference(source, theirs, expected, own)
    assert torch.equal(target, expected)


def test_pools_of_other_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="1 pages of 64 bytes to 1 of 32"):
        copy_pages(draw_bytes(4, 64), torch.tensor([0]), draw_bytes(4, 32), torch.tensor([0]))
    with pytest.raises(ValueError, match="int64"):
        copy_pages(
            draw_bytes(4, 64),
            torch.tensor([0], dtype=torch.int32),
            draw_bytes(4, 64),
            torch.tensor([0]),
        )
