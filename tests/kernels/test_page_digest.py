import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.page_digest import digest_pages
from splitserve_kernels.page_digest_rules import digest_pages_reference


def draw_pool(pages: int, page_bytes: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8)


@settings(max_examples=20, deadline=None)
@given(
    page_bytes=st.sampled_from([8, 48, 8192, 8 * 1024 * 9 + 8, 3 * 65536]),
    count=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_the_reference(page_bytes: int, count: int, seed: int) -> None:
    pool = draw_pool(5, page_bytes, seed)
    pages = torch.randperm(5)[:count].tolist()
    digests = digest_pages(pool, pages)
    assert digests == digest_pages_reference(pool.numpy(), pages)
    assert len(set(digests)) == count
    assert all(len(digest) == 16 for digest in digests)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_change_shows(data: st.DataObject) -> None:
    page = draw_pool(1, 256, data.draw(st.integers(0, 2**32 - 1))).numpy()
    changed = page.copy()
    kind = data.draw(st.sampled_from(["bit", "swap", "shift", "zero"]))
    at = data.draw(st.integers(0, 31)) * 8
    if kind == "bit":
        changed[0, at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "swap":
        other = data.draw(st.integers(0, 31)) * 8
        changed[0, [at, other]] = changed[0, [other, at]]
    elif kind == "shift":
        changed = np.roll(page, 8 * data.draw(st.integers(1, 31)), 1)
    else:
        changed[0, at:] = 0
    same = bool((page == changed).all())
    assert (digest_pages_reference(page, [0]) == digest_pages_reference(changed, [0])) is same


def test_the_reference_by_hand() -> None:
    """So that no release changes what digests mean without being noticed."""
    zeros = np.zeros((1, 8), np.uint8)
    first, second = (0x1E3779B97F4A7C15, 0x5851F42D4C957F2D)
    mask = (1 << 64) - 1

    def mix(word: int, a: int, b: int) -> int:
        word = (word ^ word >> 32) * a & mask
        word = (word ^ word >> 29) * b & mask
        return word ^ word >> 32

    expected = b""
    for step, a, b in (
        (first, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB),
        (second, 0x6C8E9CF570932BD5, 0x2545F4914F6CDD1D),
    ):
        expected += mix(mix(step, a, b) ^ (8 * step & mask), a, b).to_bytes(8, "little")
    assert digest_pages_reference(zeros, [0]) == [expected]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="64-bit words"):
        digest_pages(draw_pool(2, 12, 0), [0])
    with pytest.raises(IndexError, match="not one of 2"):
        digest_pages(draw_pool(2, 16, 0), [2])
