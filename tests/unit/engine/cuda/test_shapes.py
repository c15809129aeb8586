"""Which steps are recorded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.cuda.shapes import graph_shapes


@pytest.mark.parametrize("max_batch", [1, 5, 64, 100, 256, 500])
def test_every_decode_step_has_a_graph_of_about_its_size(max_batch: int) -> None:
    shapes = graph_shapes(max_batch, 8192)
    assert max(shape.slots for shape in shapes) == max_batch
    for slots in range(1, max_batch + 1):
        fitting = min(s.slots for s in shapes if s.holds(StepShape(slots)))
        assert fitting - slots <= max(3, slots / 7)


def test_short_chunks_beside_a_batch_have_one_too() -> None:
    shapes = graph_shapes(256, 8192)
    assert any(shape.holds(StepShape(250, 180, 3)) for shape in shapes)
    assert not any(shape.holds(StepShape(250, 4000, 3)) for shape in shapes)
    assert any(shape.holds(StepShape(0, 2000, 3)) for shape in shapes)


@given(st.integers(1, 300), st.integers(16, 1024), st.data())
def test_every_short_step_has_one(max_batch: int, spare: int, data: st.DataObject) -> None:
    """However few of those in the slots decode: the others' prompts are in chunks."""
    most = max_batch + spare
    slots = data.draw(st.integers(0, max_batch))
    rows = data.draw(st.integers(1, min(most - (1 if slots else 0), 1024)))
    shapes = graph_shapes(max_batch, most)
    assert len(shapes) == len(set(shapes))
    assert any(shape.holds(StepShape(slots, rows, 3)) for shape in shapes)


@pytest.mark.parametrize(
    ("max_batch", "most", "slots", "rows"),
    [(16, 1020, 16, 1004), (48, 2048, 46, 300), (256, 512, 17, 496)],
)
def test_prompts_may_hold_the_low_slots(max_batch: int, most: int, slots: int, rows: int) -> None:
    step = StepShape(slots, rows, 1)
    assert any(shape.holds(step) for shape in graph_shapes(max_batch, most))


@pytest.mark.parametrize("max_step_tokens", [192, 272, 512])
def test_full_steps_of_a_decode_worker_are_hardly_padded(max_step_tokens: int) -> None:
    shapes = graph_shapes(128, max_step_tokens)
    for slots in range(1, 129):
        step = StepShape(slots, max_step_tokens - slots, 3)
        assert min(s.total_rows for s in shapes if s.holds(step)) < max_step_tokens + 32


@pytest.mark.parametrize("tokens", [64, 300, 512, 2048])
def test_no_step_is_recorded_that_cannot_come(tokens: int) -> None:
    shapes = graph_shapes(8, tokens)
    assert any(shape.holds(StepShape(0, tokens, 1)) for shape in shapes)
    sizes = sorted({shape.rows for shape in shapes})
    assert all(rows < tokens for rows in sizes[:-1])
