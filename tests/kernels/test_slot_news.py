import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.slot_news import apply_slot_news, apply_slot_news_reference

SLOTS, WIDTH = 13, 64


@settings(max_examples=40, deadline=None)
@given(
    num_moves=st.integers(0, SLOTS),
    num_pages=st.sampled_from([0, 1, 7, 256, 257, 600]),
    seed=st.integers(0, 2**32 - 1),
)
def test_as_the_reference(num_moves: int, num_pages: int, seed: int) -> None:
    """Slots may give a token and get another's."""
    rng = random.Random(seed)
    news = torch.tensor(
        [
            *(rng.randrange(SLOTS) for _ in range(num_moves)),
            *rng.sample(range(SLOTS), num_moves),
            *rng.sample(range(SLOTS * WIDTH), num_pages),
            *(rng.randrange(1 << 31) for _ in range(num_pages)),
        ],
        dtype=torch.int64,
    )
    tokens = torch.tensor([rng.getrandbits(40) for _ in range(SLOTS)])
    pages = torch.full((SLOTS, WIDTH), -7, dtype=torch.int32)
    expected = tokens.clone(), pages.clone()
    apply_slot_news(tokens, pages, news, num_moves, num_pages)
    apply_slot_news_reference(*expected, news, num_moves, num_pages)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(pages, expected[1])


@pytest.mark.parametrize(
    ("news", "moves", "pages", "named"),
    [
        (torch.zeros(3, dtype=torch.int64), 1, 1, "3 numbers for 1 moves and 1 pages"),
        (torch.zeros(2, dtype=torch.int32), 1, 0, "int64"),
        (torch.zeros(28, dtype=torch.int64), 14, 0, "14 moves among 13"),
        (torch.zeros(4, dtype=torch.int64)[::2], 1, 0, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(
    news: torch.Tensor, moves: int, pages: int, named: str
) -> None:
    tokens, table = torch.zeros(SLOTS, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=named):
        apply_slot_news(tokens, table, news, moves, pages)
