"""Which steps are recorded."""

import pytest

pytest.importorskip("triton")

from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.cuda.opening import graph_shapes


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


@pytest.mark.parametrize("tokens", [64, 300, 512, 2048])
def test_no_step_is_recorded_that_cannot_come(tokens: int) -> None:
    shapes = graph_shapes(8, tokens)
    assert any(shape.holds(StepShape(0, tokens, 1)) for shape in shapes)
    sizes = sorted({shape.rows for shape in shapes})
    assert all(rows < tokens for rows in sizes[:-1])
