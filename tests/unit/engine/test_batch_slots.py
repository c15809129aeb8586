"""Slots of a batch, whoever joins and leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.batch_slots import BatchSlots
from splitserve.engine.sequence import Sequence
from splitserve.sampling import SamplingParams

COUNT = 6


@given(st.lists(st.tuples(st.sampled_from("jlc"), st.integers(0, COUNT - 1)), max_size=60))
def test_slots_are_apart_and_dense_once_ranks_are_closed(turns: list[tuple[str, int]]) -> None:
    """Each knows the slot it had when ranks were closed last, or joined since."""
    slots, running = BatchSlots(COUNT), list[Sequence]()
    known: dict[str, int] = {}
    for turn, (what, index) in enumerate(turns):
        if what == "j" and len(running) < COUNT:
            running.append(Sequence(str(turn), [1], SamplingParams(), seed=0))
            slots.take(running[-1])
            known[running[-1].id] = running[-1].slot
        elif what == "l" and running:
            gone = running.pop(index % len(running))
            slots.leave(gone)
            assert gone.slot == gone.came_from == -1
        elif what == "c":
            slots.close_ranks(running)
            assert sorted(s.slot for s in running) == list(range(len(running)))
            for sequence in running:
                before = sequence.slot if sequence.came_from < 0 else sequence.came_from
                assert before == known[sequence.id]
                assert sequence.slot <= before
                known[sequence.id], sequence.came_from = sequence.slot, -1
        assert len({s.slot for s in running}) == len(running)


def test_one_that_moves_twice_remembers_where_it_was_computed() -> None:
    slots, running = BatchSlots(4), [Sequence(n, [1], SamplingParams(), seed=0) for n in "abcd"]
    for sequence in running:
        slots.take(sequence)
    last, places = running[3], []
    for index in (2, 0):
        slots.leave(running.pop(index))
        slots.close_ranks(running)
        places.append(last.slot)
    assert places == [2, 0]
    assert last.came_from == 3
