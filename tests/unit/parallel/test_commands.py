from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.cuda.layout import StepPlan, placed_by_order
from splitserve.engine.protocol import Draw, Slice
from splitserve.parallel.commands import decode_step, encode_step
from splitserve.sampling import SamplingParams

BLOCK = 4
DRAW = Draw(SamplingParams(), 7, 0, (1,), ())
NUMBERS = st.integers(0, 2**32 - 1)


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    tokens = draw(st.lists(NUMBERS, min_size=1, max_size=9))
    start = draw(st.integers(0, 40))
    used = -(-(start + len(tokens)) // BLOCK)
    pages = draw(st.lists(NUMBERS, min_size=used, max_size=used + 3))
    return Slice(tokens, start, pages, [DRAW] * draw(st.integers(0, 3)))


@given(st.lists(slices(), max_size=6))
def test_followers_see_the_step(parts: list[Slice]) -> None:
    decoded = decode_step(encode_step(parts, BLOCK))
    assert len(decoded) == len(parts)
    for sent, got in zip(parts, decoded, strict=True):
        used = -(-(sent.start + len(sent.token_ids)) // BLOCK)
        assert (got.token_ids, got.start) == (sent.token_ids, sent.start)
        assert got.pages == sent.pages[:used]
        assert len(got.draws) == len(sent.draws)


@given(st.lists(slices(), max_size=6), st.permutations(range(6)))
def test_ranks_lay_a_step_out_alike(parts: list[Slice], slots: list[int]) -> None:
    """Rank 0 has slices of a batch's slots, the others do not know of them."""
    own = [part._replace(slot=slot) for part, slot in zip(parts, slots, strict=False)]
    theirs = decode_step(encode_step(own, BLOCK))
    laid = []
    for each in (own, theirs):
        plan = StepPlan.of(placed_by_order(each))
        numbers = np.empty(plan.shape.size, np.int64)
        numbers[:] = -7
        plan.lay_out(plan.shape, numbers, nobody=9)
        laid.append((plan.shape, plan.logit_rows(plan.shape), numbers.tolist()))
    assert laid[0] == laid[1]


@pytest.mark.parametrize("cut", [4, 8, 24])
def test_a_step_that_is_cut_is_refused(cut: int) -> None:
    whole = encode_step([Slice([1, 2, 3], 2, [5, 6], [DRAW])], BLOCK)
    with pytest.raises(ValueError, match="a step"):
        decode_step(whole[:-cut])
    with pytest.raises(ValueError, match="a step"):
        decode_step(b"")
