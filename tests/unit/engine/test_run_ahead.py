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
    written: list[tuple[abc.Sequence[int], set[int]]]
    """Of each slice, its pages and those of them that the step writes."""
    drawn: list[list[DrawnToken]]
    fails: bool

    def done(self) -> bool:
        return self.owner.is_done()

    def tokens(self) -> list[list[DrawnToken]]:
        assert self.owner.in_flight.popleft() is self, "steps are read in their order"
        if self.fails:
            raise RuntimeError("device lost")
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
        self.slots: list[int] = []
        self.launches = 0
        self.fail_launch = 0
        self.fail_tokens = 0
        self.is_done: abc.Callable[[], bool] = lambda: True

    def launch(
        self, slices: abc.Sequence[Slice], layers_done: LayersDone | None = None
    ) -> LateStep:
        self.launches += 1
        if self.launches == self.fail_launch:
            raise RuntimeError("out of memory")
        self.slots = sorted(part.slot for part in slices)
        assert len(set(self.slots)) == len(slices)
        known = []
        for part in slices:
            assert part.slot >= 0
            if part.token_ids[-1] == DRAWN:
                before = part.slot if part.came_from < 0 else part.came_from
                part = part._replace(token_ids=[self.tokens[before]])
            known.append(part._replace(pages=list(part.pages)))
        written = [(part.pages, self._pages_of(part)) for part in slices]
        for flight in self.in_flight:
            for owner, pages in flight.written:
                for other, others in written:
                    assert owner is other or not pages & others
        drawn = self.step(known, layers_done)
        self.tokens.update(
            (part.slot, tokens[0].token_id)
            for part, tokens in zip(known, drawn, strict=True)
            if tokens
        )
        fails = self.launches == self.fail_tokens
        self.in_flight.append(LateStep(self, written, drawn, fails))
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


def test_who_comes_while_a_step_is_computed_is_launched_behind_it() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=40)
    core = make_core(engine, heard)

    def is_done() -> bool:
        if engine.launches == 1:
            core.submit(prefill_of("second"))
            return False
        return True

    engine.is_done = is_done
    core.submit(prefill_of("first"))
    assert core.step()
    assert core.step(), "it hears of the second"
    assert (engine.launches, heard) == (1, [])
    assert core.step()
    assert (engine.launches, len(heard)) == (2, 1), "launched, then the first was read"
    run(core)
    assert [output.sequence.id for output in heard] == ["first", "second"]
    assert engine.most_in_flight == 2


def test_who_comes_long_before_a_step_is_over_waits_for_others() -> None:
    """By the rate the step takes another hour."""
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=40)
    core = make_core(engine, heard)
    for _ in range(20):
        core._timing.took(3, 1, 3600.0)
    names = iter(["second", "third"])

    def is_done() -> bool:
        name = next(names, None)
        if name:
            core.submit(prefill_of(name))
        return name is None

    engine.is_done = is_done
    core.submit(prefill_of("first"))
    assert core.step()
    assert core.step()
    assert (engine.launches, len(heard)) == (1, 1), "read, with nothing launched behind it"
    assert core.step()
    assert engine.slots == [0, 1], "both of them"
    run(core)
    assert len(heard) == 3


def test_a_core_that_is_stopped_reads_what_is_in_flight() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=40)
    core = make_core(engine, heard)

    def is_done() -> bool:
        core._stopping = True
        return False

    engine.is_done = is_done
    core.submit(prefill_of("first"))
    assert core.step()
    assert core.step()
    assert [output.prefill_done for output in heard] == [True]


def test_news_that_are_nothing_to_launch_do_not_land_a_step() -> None:
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=40)
    core = make_core(engine, heard)
    looks = iter([False, False, True])

    def is_done() -> bool:
        core.abort("nobody")
        return next(looks, True)

    engine.is_done = is_done
    core.submit(prefill_of("first"))
    for _ in range(3):
        assert core.step()
        assert heard == []
    run(core)
    assert len(heard) == 1


def prefill_of(name: str) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=1)
    return Sequence(name, [1, 2, 3], params, seed=0, prefill_choices=1)


def test_who_gets_its_kv_while_a_step_is_computed_joins_the_one_behind_it() -> None:
    """The step that is next is not launched long before the one in flight is over."""
    heard: list[SequenceOutput] = []
    engine = LateEngine(num_pages=40)
    core = make_core(engine, heard)
    params = SamplingParams(temperature=0, max_tokens=9)
    core.submit(Sequence("a", [3, 5], params, seed=0))
    core.step()
    core.submit(Sequence("d", [4, 6], params, seed=0, await_first_token=True))
    core.step()
    for _ in range(40):
        core._timing.took(0, 1, 3600.0)
    looks = iter([False, False, True])

    def is_done() -> bool:
        core.first_token("d", expected_tokens([4, 6], 1)[0])
        return next(looks)

    engine.is_done = is_done
    core.step()
    assert next(looks, None) is None, "it waited for the end of the step in flight"
    assert engine.slots == [0, 1], "both of them"
    engine.is_done = lambda: True
    run(core)
    assert tokens_of(heard, "a") == expected_tokens([3, 5], 9)
    assert tokens_of(heard, "d") == expected_tokens([4, 6], 9)[1:]


def known_to_be_slow(core: EngineCore) -> None:
    for _ in range(40):
        core._timing.took(0, 1, 3600.0)


def test_a_step_is_not_launched_late_for_those_who_find_no_place() -> None:
    engine = LateEngine(num_pages=40)
    core = make_core(engine, [], max_batch=1)
    params = SamplingParams(temperature=0, max_tokens=9)
    core.submit(Sequence("a", [3, 5], params, seed=0))
    core.step()
    core.submit(Sequence("d", [4, 6], params, seed=0, await_first_token=True))
    known_to_be_slow(core)
    engine.is_done = lambda: pytest.fail("nobody waits for the step in flight")
    core.step()
    assert engine.launches == 2


def test_a_core_that_is_stopped_launches_at_once() -> None:
    engine = LateEngine(num_pages=40)
    core = make_core(engine, [])
    params = SamplingParams(temperature=0, max_tokens=9)
    core.submit(Sequence("a", [3, 5], params, seed=0))
    core.submit(Sequence("d", [4, 6], params, seed=0, await_first_token=True))
    core.step()
    known_to_be_slow(core)
    looks = []

    def is_done() -> bool:
        looks.append(len(looks))
        core._stopping = len(looks) == 3
        return False

    engine.is_done = is_done
    core.step()
    assert len(looks) == 3
    assert engine.launches == 2
