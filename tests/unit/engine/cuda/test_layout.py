"""How a step's numbers lie, and what a graph of a larger shape makes of them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.cuda.layout import NOBODY, StepPlan, StepShape
from splitserve.engine.protocol import DRAWN, Draw, Slice
from splitserve.sampling import SamplingParams

DRAW = Draw(SamplingParams(), 0, 0, (), ())
NO_SLOT = 99


def decoding(slot: int, start: int) -> Slice:
    return Slice([DRAWN], start, [], [DRAW], slot)


def chunk(slot: int, start: int, count: int) -> Slice:
    return Slice(list(range(100, 100 + count)), start, [], [DRAW], slot)


def parts(plan: StepPlan, shape: StepShape) -> list[list[int]]:
    out = np.full(shape.size, -7)
    plan.lay_out(shape, out, nobody=NO_SLOT)
    return [out[section].tolist() for section in shape.sections]


def test_a_step_by_hand() -> None:
    plan = StepPlan.of([decoding(2, 9), chunk(1, 4, 3), decoding(0, 5), chunk(3, 0, 1)])
    # One token with a draw decodes, wherever its sequence stands.
    assert [part.slot for part in plan.decoding] == [2, 0, 3]
    assert plan.shape == StepShape(slots=4, rows=3, chunks=1)
    tokens, positions, row_slots, starts, lengths, slots = parts(plan, plan.shape)
    assert tokens == [DRAWN, 0, DRAWN, 100, 100, 101, 102]
    assert positions == [5, NOBODY, 9, 0, 4, 5, 6]
    assert row_slots == [1, 1, 1]
    assert starts == [4, 7]
    assert lengths == [7]
    assert slots == [1]
    assert plan.logit_rows(plan.shape) == {2: 2, 0: 0, 3: 3, 1: 4}


def test_padding_is_nobodys() -> None:
    plan = StepPlan.of([decoding(0, 5), chunk(1, 0, 2)])
    shape = StepShape(slots=3, rows=4, chunks=3)
    tokens, positions, row_slots, starts, lengths, slots = parts(plan, shape)
    assert tokens == [DRAWN, 0, 0, 100, 101, 0, 0]
    assert positions == [5, NOBODY, NOBODY, 0, 1, NOBODY, NOBODY]
    assert row_slots == [1, 1, NO_SLOT, NO_SLOT]
    assert starts == [3, 5, 5, 5]
    assert lengths == [2, 0, 0]
    assert slots == [1, NO_SLOT, NO_SLOT]
    assert plan.logit_rows(shape) == {0: 0, 1: 3}


@pytest.mark.parametrize("draws", [[], [DRAW, DRAW]])
def test_one_token_without_one_draw_is_a_chunk(draws: list[Draw]) -> None:
    plan = StepPlan.of([Slice([3], 8, [], draws, 0)])
    assert plan.shape == StepShape(slots=0, rows=1, chunks=1)


@given(slots=st.integers(0, 300), rows=st.integers(0, 300), chunks=st.integers(0, 20))
def test_sections_are_aligned_and_apart(slots: int, rows: int, chunks: int) -> None:
    shape = StepShape(slots, rows, chunks)
    sections = shape.sections
    assert all(section.start % 2 == 0 for section in sections)
    assert shape.size % 2 == 0
    assert all(a.stop <= b.start for a, b in pairwise(sections))


def test_a_shape_holds_what_is_no_larger_in_any_way() -> None:
    shape = StepShape(8, 64, 4)
    assert shape.holds(StepShape(8, 64, 4))
    assert shape.holds(StepShape(0, 1, 1))
    for larger in (StepShape(9), StepShape(0, 65, 1), StepShape(0, 10, 5)):
        assert not shape.holds(larger)


def test_a_step_that_tells_of_its_layers_has_a_chunk() -> None:
    assert StepShape(3).telling() == StepShape(3, 1, 1)
    assert StepShape(3, 9, 2).telling() == StepShape(3, 9, 2)
