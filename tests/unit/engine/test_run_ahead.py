"""The loop on an engine whose tokens are read one step late."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.fake import FakeEngine, expected_tokens
from splitserve.engine.protocol import DRAWN, DrawnToken, LayersDone, Slice
from splitserve.engine.sequence import Sequence, SequenceOutput, State
from splitserve.sampling import FinishReason, SamplingParams


@dataclass
class LateStep:
    """A step whose tokens are there, and were not read."""

    owner: LateEngine
    written: dict[int, set[int]]
    drawn: list[list[DrawnToken]]

    def tokens(self) -> list[list[DrawnToken]]:
        assert self.owner.in_flight.popleft() is self, "steps are read in their order"
        return self.drawn


class LateEngine(FakeEngine):
    """An `AsyncEngine` that knows the tokens before the loop does, as a device would, and checks
    that no page of a step in flight is another sequence's.
    """

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)  # type: ignore[arg-type]
        self.in_flight: deque[LateStep] = deque()
        self.most_in_flight = 0
        self.tokens: dict[int, int] = {}

    def launch(
        self, slices: abc.Sequence[Slice], layers_done: LayersDone | None = None
    ) -> LateStep:
        assert len({part.slot for part in slices}) == len(slices)
        known = []
        for part in slices:
            assert part.slot >= 0
            if part.token_ids[-1] == DRAWN:
                part = replace(part, token_ids=[self.tokens[part.slot]])
            known.append(replace(part, pages=list(part.pages)))
        written = {id(part.pages): self._pages_of(part) for part in slices}
        for flight in self.in_flight:
            for owner, pages in flight.written.items():
                for other, others in written.items():
                    assert owner == other or not pages & others
        drawn = self.step(known, layers_done)
        self.tokens.update(
            (part.slot, tokens[0].token_id)
            for part, tokens in zip(known, drawn, strict=True)
            if tokens
        )
        self.in_flight.append(LateStep(self, written, drawn))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return self.in_flight[-1]

    def _pages_of(self, part: Slice) -> set[int]:
        block = self.spec.block_tokens
        end = part.start + len(part.token_ids)
        return set(part.pages[part.start // block : -(-end // block)])


def make_core(engine: LateEngine, heard: list[SequenceOutput], **config: int | bool) -> EngineCore:
    sizes = {"max_batch": 16, "max_step_tokens": 64, **config}
    return EngineCore(
        engine,
        CoreConfig(**sizes),
        lambda step, outputs: heard.extend(outputs),  # type: ignore[arg-type]
    )


def tokens_of(heard: list[SequenceOutput], name: str) -> list[int]:
    return [t.token_id for o in heard if o.sequence.id == name for t in o.tokens]


def run(core: EngineCore) -> None:
    while core.step():
        pass


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 999), min_size=1, max_size=90), min_size=1, max_size=9
    ),
    count=st.integers(1, 40),
    num_pages=st.integers(9, 40),
    max_batch=st.integers(1, 8),
    step_tokens=st.integers(24, 120),
    reuse=st.booleans(),
    greedy=st.booleans(),
)
def test_any_mix_gives_the_same_tokens(
    prompts: list[list[int]],
    count: int,
    num_pages: int,
    max_batch: int,
    step_tokens: int,
    reuse: bool,
    greedy: bool,
) -> None:
    """Whatever the batch, the chunks, preemptions and prefix hits."""
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=num_pages)
    core = make_core(
        engine, heard, max_batch=max_batch, max_step_tokens=step_tokens, reuse_prefixes=reuse
    )
    params = SamplingParams(temperature=0 if greedy else 1, max_tokens=count, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.submit(Sequence(str(index), prompt, params, seed=5))
    run(core)
    seed = None if greedy else 5
    for index, prompt in enumerate(prompts):
        assert tokens_of(heard, str(index)) == expected_tokens(prompt, count, seed=seed)
    assert core.stats().free_pages == num_pages
    assert not engine.in_flight


def test_the_next_step_is_launched_before_the_last_is_read() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine()
    core = make_core(engine, heard)
    core.submit(Sequence("a", [3, 5], SamplingParams(temperature=0, max_tokens=9), seed=0))
    core.step()
    assert len(engine.in_flight) == 1
    assert not heard
    run(core)
    assert engine.most_in_flight == 2
    assert tokens_of(heard, "a") == expected_tokens([3, 5], 9)


def test_what_was_computed_past_an_unforeseen_end_is_dropped() -> None:
    """A stop token is seen when the step after it is on its way."""
    expected = expected_tokens([3, 5], 6)
    stop = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=(expected[5],))
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=8)
    core = make_core(engine, heard)
    core.submit(Sequence("a", [3, 5], stop, seed=0))
    run(core)
    assert tokens_of(heard, "a") == expected
    assert heard[-1].finish_reason is FinishReason.STOP
    assert core.stats().free_pages == 8


def test_a_known_end_costs_no_step() -> None:
    heard: list[SequenceOutput] = []
    core = make_core(LateEngine(), heard)
    core.submit(Sequence("a", [3, 5], SamplingParams(temperature=0, max_tokens=7), seed=0))
    run(core)
    assert core.stats().steps == 7


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_aborted_sequence_keeps_its_pages_until_its_step_is_read(steps: int) -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=4)
    core = make_core(engine, heard)
    sequence = Sequence("a", [1] * 20, SamplingParams(temperature=0, max_tokens=30), seed=0)
    core.submit(sequence)
    for _ in range(steps):
        core.step()
    core.abort("a")
    core._read_inbox()
    assert sequence.state is State.FINISHED
    assert core.stats().free_pages < 4
    run(core)
    assert core.stats().free_pages == 4
    assert not any(output.finish_reason for output in heard)


def test_stopping_reads_what_is_in_flight() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine()
    core = make_core(engine, heard)
    core.submit(Sequence("a", [3, 5], SamplingParams(temperature=0, max_tokens=50), seed=0))
    core.step()
    core.step()
    core.stop()
    assert not engine.in_flight
    assert heard[-1].error
    assert tokens_of(heard, "a") == expected_tokens([3, 5], 2)
