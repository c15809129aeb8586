"""The loop on an engine whose tokens are read one step late."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.fake import expected_tokens
from splitserve.engine.sequence import Sequence, SequenceOutput, State
from splitserve.sampling import FinishReason, SamplingParams

from .late_engine import LateEngine, make_core, run, tokens_of


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
    params = SamplingParams(temperature=0 if greedy else 1, ignore_eos=True)
    counts = [1 + (index + 1) * count % 40 for index in range(len(prompts))]
    for index, prompt in enumerate(prompts):
        own = replace(params, max_tokens=counts[index])
        core.submit(Sequence(str(index), prompt, own, seed=5))
    run(core)
    seed = None if greedy else 5
    for index, prompt in enumerate(prompts):
        assert tokens_of(heard, str(index)) == expected_tokens(prompt, counts[index], seed=seed)
    assert core.stats().free_pages == num_pages
    assert not engine.in_flight


def test_the_last_ones_take_the_places_of_those_who_have_left() -> None:
    """Nobody sits past those of the step before, and each goes on from its own token."""
    heard: list[SequenceOutput] = []
    engine = LateEngine()
    core = make_core(engine, heard)
    counts = [3, 12, 5, 5, 12, 8, 12]
    for index, count in enumerate(counts):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        core.submit(Sequence(str(index), [index, 5], params, seed=0))
    sizes = [7]
    while engine.launches < max(counts):
        core.step()
        assert engine.slots[-1] < sizes[-1]
        sizes.append(len(engine.slots))
    assert sizes[1:] == [7] * 3 + [6] * 2 + [4] * 3 + [3] * 4
    run(core)
    for index, count in enumerate(counts):
        assert tokens_of(heard, str(index)) == expected_tokens([index, 5], count)


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


def test_a_step_that_cannot_be_launched_fails_its_own_sequences_alone() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=16)
    core = make_core(engine, heard)
    engine.fail_launch = 3
    core.submit(Sequence("a", [3, 5], SamplingParams(temperature=0, max_tokens=9), seed=0))
    run(core)
    # The step before had been launched, and its token is emitted.
    assert tokens_of(heard, "a") == expected_tokens([3, 5], 2)[:1]
    assert heard[-1].error
    assert core.stats().free_pages == 16
    core.submit(Sequence("a", [3, 5], SamplingParams(temperature=0, max_tokens=4), seed=0))
    run(core)
    assert tokens_of(heard, "a")[1:] == expected_tokens([3, 5], 4)


def test_a_step_that_fails_forgets_who_had_ended_before() -> None:
    """It ends by a stop token while the step that fails is on its way."""
    expected = expected_tokens([3, 5], 3)
    stop = SamplingParams(temperature=0, max_tokens=50, stop_token_ids=(expected[2],))
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=16)
    core = make_core(engine, heard)
    engine.fail_tokens = 4
    core.submit(Sequence("a", [3, 5], stop, seed=0))
    run(core)
    assert heard[-1].finish_reason is FinishReason.STOP
    assert core.stats().free_pages == 16
    core.submit(Sequence("a", [3, 5], stop, seed=0))
    run(core)
    assert tokens_of(heard, "a") == expected * 2


@dataclass
class Sink:
    """Notes what it is told; raises where it is told to."""

    raises: bool = False
    blocks: int = 0

    def begin(
        self, keys: abc.Sequence[bytes], pages: abc.Sequence[int], num_cached_blocks: int
    ) -> None:
        self.blocks = num_cached_blocks

    def layers_done(self, *_: int) -> None:
        pass

    def blocks_done(self, first_block: int, end_block: int) -> None:
        if self.raises:
            raise RuntimeError("the event loop is closed")
        assert first_block <= self.blocks
        self.blocks = max(self.blocks, end_block)


def test_prefills_are_drawn_once_and_their_pages_stay_until_released() -> None:
    heard: list[SequenceOutput] = []
    core = make_core(LateEngine(num_pages=16), heard)
    sink = Sink()
    params = SamplingParams(temperature=0, max_tokens=9)
    core.submit(Sequence("p", [7] * 100, params, seed=0, sink=sink, prefill_choices=3))
    run(core)
    [output] = heard
    assert output.prefill_done
    first = expected_tokens([7] * 100, 1)
    assert [token.token_id for token in output.tokens] == first * 3
    assert sink.blocks == 7
    assert core.stats().free_pages == 16 - 7
    core.release("p")
    run(core)
    assert core.stats().free_pages == 16


def test_a_sink_that_fails_costs_its_own_sequence() -> None:
    heard: list[SequenceOutput] = []
    core = make_core(LateEngine(num_pages=16), heard)
    params = SamplingParams(temperature=0, max_tokens=6)
    core.submit(Sequence("p", [7] * 20, params, seed=0, sink=Sink(raises=True), prefill_choices=1))
    core.submit(Sequence("a", [3, 5], params, seed=0))
    run(core)
    assert [output.sequence.id for output in heard if output.error] == ["p"]
    assert tokens_of(heard, "a") == expected_tokens([3, 5], 6)


def test_a_token_drawn_elsewhere_begins_the_batch() -> None:
    heard: list[SequenceOutput] = []
    core = make_core(LateEngine(), heard)
    params = SamplingParams(temperature=0, max_tokens=6)
    core.submit(Sequence("d", [3, 5], params, seed=0, await_first_token=True))
    run(core)
    expected = expected_tokens([3, 5], 6)
    core.first_token("d", expected[0])
    run(core)
    assert tokens_of(heard, "d") == expected[1:]
