"""When a step is launched behind the one in flight: at once, late, or with who has come since."""

from __future__ import annotations

import pytest

from splitserve.engine.core import EngineCore
from splitserve.engine.fake import expected_tokens
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.sampling import SamplingParams

from .late_engine import LateEngine, make_core, run, tokens_of


def prefill_of(name: str) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=1)
    return Sequence(name, [1, 2, 3], params, seed=0, prefill_choices=1)


def known_to_be_slow(core: EngineCore) -> None:
    for _ in range(40):
        core._timing.took(0, 1, 3600.0)


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


def test_a_step_is_not_launched_late_for_those_who_find_no_place() -> None:
    engine = LateEngine(num_pages=40)
    core = make_core(engine, [], max_batch=1)
    params = SamplingParams(temperature=0, max_tokens=9)
    core.submit(Sequence("a", [3, 5], params, seed=0))
    core.step()
    core.submit(Sequence("d", [4, 6], params, seed=0, await_first_token=True))
    core.step()
    assert core.stats().running == 2, "it has its pages"
    known_to_be_slow(core)
    engine.is_done = lambda: pytest.fail("nobody waits for the step in flight")
    core.step()
    assert engine.launches == 3


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
