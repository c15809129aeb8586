"""What is made of recorded graphs, with recordings that only take notes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from splitserve.engine.cuda.graphs import StepGraphs, _Recorded, _Recording
from splitserve.engine.cuda.layout import StepShape


class Notes(list[str]):
    """What was launched and told of, in order."""

    def part(self, name: str) -> object:
        notes = self

        class Part:
            def replay(self) -> None:
                notes.append(name)

        return Part()


def recorded(notes: Notes, *layers: int) -> _Recorded:
    parts = [notes.part(f"part {i}") for i in range(len(layers) + 1)]
    nothing = torch.empty(0)
    return _Recorded(parts, list(layers), nothing, nothing)  # type: ignore[arg-type]


def test_each_part_is_told_of_once_it_is_launched() -> None:
    notes = Notes()
    step = recorded(notes, 3, 5)
    step.replay(lambda layer: notes.append(f"layer {layer}"))
    assert notes == ["part 0", "layer 3", "part 1", "layer 5", "part 2"]
    notes.clear()
    step.replay()
    assert notes == ["part 0", "part 1", "part 2"]


def test_a_recording_ends_parts_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()

    class Graph:
        def capture_begin(self, pool: object) -> None:
            notes.append("begin")

        def capture_end(self) -> None:
            notes.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    recording = _Recording(None, lambda layer: layer in (1, 2))
    recording.begin()
    for layer in range(3):
        recording.layer_done(layer)
    recording.end()
    recording.end()
    assert notes == ["begin", "end"] * 3
    assert recording.last_layers == [1, 2]


def test_the_cheapest_that_holds_a_step_takes_it() -> None:
    graphs = StepGraphs.__new__(StepGraphs)
    shapes = [StepShape(2), StepShape(4), StepShape(8), StepShape(8, 64, 4), StepShape(8, 32, 4)]
    graphs._shapes = shapes  # in the order of their cost
    assert graphs.fitting(StepShape(1)) == StepShape(2)
    assert graphs.fitting(StepShape(5)) == StepShape(8)
    assert graphs.fitting(StepShape(5, 20, 2)) == StepShape(8, 64, 4)
    assert graphs.fitting(StepShape(9)) is None
