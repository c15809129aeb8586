"""The loop on the fake engine: every token is the one that arithmetic says."""

import struct
import threading
from collections import abc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.fake import FakeEngine, expected_tokens
from splitserve.engine.protocol import DrawnToken, LayersDone, Slice
from splitserve.engine.sequence import PageLoad, Sequence
from splitserve.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from splitserve.kv.keys import chain_keys, root_key
from splitserve.sampling import FinishReason, SamplingParams

from .conftest import Bench, MakeBench

PROMPTS = st.lists(st.integers(0, 999), min_size=1, max_size=90)


def pool_is_free(bench: Bench) -> bool:
    stats = bench.core.stats()
    return stats.free_pages == stats.total_pages


def test_arithmetic_of_the_docstring() -> None:
    assert expected_tokens([3, 5], 2, vocab_size=100) == [13, 52]


def test_one_sequence(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", [3, 5], count=20)
    assert bench.run() == 20
    assert bench.tokens["a"] == expected_tokens([3, 5], 20)
    assert bench.finish["a"] is FinishReason.LENGTH
    assert pool_is_free(bench)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, 999), min_size=1, max_size=90), min_size=1, max_size=9
    ),
    count=st.integers(1, 40),
    num_pages=st.integers(9, 40),
    max_batch=st.integers(1, 8),
    step_tokens=st.integers(24, 120),
    reuse=st.booleans(),
)
def test_any_mix_gives_the_same_tokens(
    prompts: list[list[int]],
    count: int,
    num_pages: int,
    max_batch: int,
    step_tokens: int,
    reuse: bool,
) -> None:
    """Whatever the batch, the chunks, preemptions and prefix hits."""
    tokens: dict[str, list[int]] = {}
    core = EngineCore(
        FakeEngine(num_pages=num_pages),
        CoreConfig(max_batch=max_batch, max_step_tokens=step_tokens, reuse_prefixes=reuse),
        lambda _, outputs: (
            [
                tokens.setdefault(o.sequence.id, []).extend(t.token_id for t in o.tokens)
                for o in outputs
            ]
            and None
        ),
    )
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        core.submit(Sequence(str(index), prompt, params, seed=0))
    while core.step():
        pass
    assert tokens == {str(i): expected_tokens(p, count) for i, p in enumerate(prompts)}
    assert core.stats().free_pages == num_pages


def test_sequences_join_and_leave_at_every_step(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("long", [1, 2, 3], count=30)
    for _ in range(5):
        bench.core.step()
    bench.submit("short", [9] * 20, count=2)
    bench.core.step()
    bench.core.step()
    assert bench.tokens["short"] == expected_tokens([9] * 20, 2)
    assert len(bench.tokens["long"]) == 7
    bench.run()
    assert bench.tokens["long"] == expected_tokens([1, 2, 3], 30)


def test_preempted_sequence_goes_on_exactly(make_bench: MakeBench) -> None:
    bench = make_bench(num_pages=8)
    for index in range(4):
        bench.submit(str(index), [index + 1] * 16, count=40)
    bench.run()
    assert bench.core.stats().num_preemptions > 0
    for index in range(4):
        assert bench.tokens[str(index)] == expected_tokens([index + 1] * 16, 40)


def test_decoding_goes_before_prompts(make_bench: MakeBench) -> None:
    """A long prompt takes what the budget leaves; it never delays a token."""
    bench = make_bench(max_batch=4, max_step_tokens=20)
    bench.submit("a", [1], count=20)
    bench.core.step()
    bench.submit("long", list(range(200)), count=1)
    for step in range(2, 12):
        bench.core.step()
        assert len(bench.tokens["a"]) == step


def test_stop_token_ends_and_is_returned(make_bench: MakeBench) -> None:
    bench = make_bench()
    tokens = expected_tokens([3, 5], 10)
    params = SamplingParams(temperature=0, max_tokens=10, stop_token_ids=[tokens[4]])
    bench.core.submit(Sequence("a", [3, 5], params, seed=0))
    bench.run()
    assert bench.tokens["a"] == tokens[: tokens.index(tokens[4]) + 1]
    assert bench.finish["a"] is FinishReason.STOP


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_frees_everything(make_bench: MakeBench, steps: int) -> None:
    bench = make_bench()
    bench.submit("a", list(range(100)), count=50)
    for _ in range(steps):
        bench.core.step()
    bench.core.abort("a")
    bench.run()
    assert pool_is_free(bench)
    assert len(bench.tokens["a"]) <= steps
    bench.submit("a", [1], count=1)
    bench.run()
    assert bench.finish["a"] is FinishReason.LENGTH


def test_live_id_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", [1])
    with pytest.raises(InvalidRequest, match="request_id"):
        bench.submit("a", [1])


def test_full_queue_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(max_queue=1)
    bench.submit("a", [1])
    with pytest.raises(Overloaded) as refused:
        bench.submit("b", [1])
    assert refused.value.retry_after_s


def test_what_can_never_fit_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(num_pages=2)
    with pytest.raises(Overloaded, match="may need 3 pages and the pool has 2"):
        bench.submit("a", [1] * 16, count=17)


class Source:
    """Remembers what it was asked to load."""

    def __init__(self) -> None:
        self.blocks: list[PageLoad] = []

    def load(self, sequence: Sequence, blocks: abc.Sequence[PageLoad]) -> None:
        self.blocks = list(blocks)


class Sink:
    """Exports pages as they are completed, like a hand-over does."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.pages: abc.Sequence[int] = ()
        self.keys: abc.Sequence[bytes] = ()
        self.layers: list[tuple[int, int, int, int]] = []
        self.done: list[int] = []
        self.cached = -1

    def begin(self, keys: abc.Sequence[bytes], pages: abc.Sequence[int], cached: int) -> None:
        self.keys, self.pages, self.cached = keys, pages, cached

    def layers_done(self, first_block: int, end_block: int, first: int, end: int) -> None:
        self.layers.append((first_block, end_block, first, end))

    def blocks_done(self, first_block: int, end_block: int) -> None:
        self.done += range(first_block, end_block)

    def content(self, block: int) -> bytes:
        out = bytearray(self.engine.spec.block_bytes)
        self.engine.export_page(self.pages[block], 0, self.engine.spec.num_layers, memoryview(out))
        return bytes(out)


PROMPT = [(7 * i) % 1000 for i in range(69)]


def prefill(make_bench: MakeBench) -> tuple[Bench, Sink]:
    bench = make_bench(max_batch=2, max_step_tokens=40)
    sink = Sink(bench.engine)
    bench.submit("p", PROMPT, prefill_choices=2, sink=sink)
    bench.run()
    return bench, sink


def test_prefill_draws_all_choices_and_keeps_its_pages(make_bench: MakeBench) -> None:
    bench, sink = prefill(make_bench)
    (output,) = bench.outputs
    assert output.prefill_done
    assert [t.token_id for t in output.tokens] == expected_tokens(PROMPT, 1) * 2
    root = root_key(bench.engine.spec.fingerprint, b"")
    assert sink.keys == chain_keys(root, PROMPT, 16)
    assert sink.done == [0, 1, 2, 3, 4]
    both = [(0, 2), (2, 4)]
    assert sink.layers == [(*blocks, *layers) for blocks in [(0, 2), (2, 5)] for layers in both]
    assert not pool_is_free(bench)
    bench.core.release("p")
    bench.run()
    assert pool_is_free(bench)


def test_aborted_prefill_keeps_its_pages_until_released(make_bench: MakeBench) -> None:
    bench = make_bench(max_batch=2, max_step_tokens=40)
    sink = Sink(bench.engine)
    bench.submit("p", PROMPT, prefill_choices=1, sink=sink)
    bench.core.step()
    bench.core.abort("p")
    bench.run()
    assert not pool_is_free(bench)
    bench.core.release("p")
    bench.run()
    assert pool_is_free(bench)


@pytest.mark.parametrize("num_loaded", [0, 1, 4, 5])
@pytest.mark.parametrize("token_first", [True, False])
def test_decode_goes_on_where_prefill_stopped(
    make_bench: MakeBench, num_loaded: int, token_first: bool
) -> None:
    """With all blocks, some or none: what was not loaded is computed."""
    _, sink = prefill(make_bench)
    first, *rest = expected_tokens(PROMPT, 8)
    bench, source = make_bench(), Source()
    bench.submit("d", PROMPT, source=source, await_first_token=True)
    if token_first:
        bench.core.first_token("d", first)
    assert bench.run() == 0
    sizes = [(b.index, b.num_tokens) for b in source.blocks]
    assert sizes == [(0, 16), (1, 16), (2, 16), (3, 16), (4, 5)]
    assert [b.key for b in source.blocks] == list(sink.keys)
    for block in source.blocks[:num_loaded]:
        bench.engine.insert_page(block.page, memoryview(sink.content(block.index)))
    bench.core.loaded("d", num_loaded)
    if not token_first:
        assert bench.run() == 0
        bench.core.first_token("d", first)
    steps = bench.run()
    assert bench.tokens["d"] == rest
    assert steps == (8 if num_loaded == 0 else 7), "only what is missing is computed"
    assert pool_is_free(bench)


def test_aborted_while_loading_keeps_pages_until_the_source_is_done(make_bench: MakeBench) -> None:
    bench, source = make_bench(), Source()
    bench.submit("d", PROMPT, source=source, await_first_token=True)
    bench.run()
    bench.core.abort("d")
    bench.run()
    assert not pool_is_free(bench)
    bench.core.loaded("d", 0)
    bench.run()
    assert pool_is_free(bench)
    assert bench.core.stats().running == 0


def test_resumed_sequence_draws_the_next_index(make_bench: MakeBench) -> None:
    tokens = expected_tokens(PROMPT, 8)
    bench = make_bench()
    bench.submit("r", PROMPT, output=tokens[:3])
    bench.run()
    assert bench.tokens["r"] == tokens[3:]


class BrokenOnce(FakeEngine):
    """Fails its second step."""

    calls = 0

    def step(
        self, slices: abc.Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("device lost")
        return super().step(slices, layers_done)


def test_failed_step_fails_its_sequences_and_nothing_else(make_bench: MakeBench) -> None:
    bench = make_bench(engine=BrokenOnce())
    bench.submit("a", [1, 2], count=5)
    bench.run()
    assert bench.outputs[-1].error
    assert "device lost" not in bench.outputs[-1].error.message
    assert pool_is_free(bench)
    bench.submit("b", [3, 5], count=5)
    bench.run()
    assert bench.tokens["b"] == expected_tokens([3, 5], 5)


def test_thread_serves_and_stops(make_bench: MakeBench) -> None:
    done = threading.Event()
    engine = FakeEngine()
    core = EngineCore(
        engine, CoreConfig(), lambda _, outputs: done.set() if outputs[0].finish_reason else None
    )
    core.start()
    core.submit(Sequence("a", [1], SamplingParams(max_tokens=3, ignore_eos=True), seed=1))
    assert done.wait(10)
    core.stop()
    assert not any(t.name == "engine" for t in threading.enumerate())


@pytest.mark.parametrize("num_loaded", [0, 1, 2])
def test_prompt_that_fills_its_last_block_has_room_for_its_first_token(
    make_bench: MakeBench, num_loaded: int
) -> None:
    prompt = PROMPT[:32]
    first, *rest = expected_tokens(prompt, 6)
    bench, source = make_bench(num_pages=4), Source()
    bench.submit("d", prompt, count=6, source=source, await_first_token=True)
    bench.run()
    for block in source.blocks[:num_loaded]:
        page = [
            entry
            for i in range(16)
            for entry in (prompt[block.index * 16 + i] + 1, block.index * 16 + i)
        ]
        content = struct.pack("<32I", *page) * 4
        bench.engine.insert_page(block.page, memoryview(content))
    bench.core.loaded("d", num_loaded)
    bench.core.first_token("d", first)
    bench.run()
    assert bench.tokens["d"] == rest
    assert not bench.outputs[-1].error


def test_awaiting_sequences_do_not_keep_others_out_of_the_batch(make_bench: MakeBench) -> None:
    """A queue at the prefill tier must not idle the decode worker."""
    bench = make_bench(max_batch=2)
    sources = [Source() for _ in range(4)]
    for index, source in enumerate(sources):
        bench.submit(f"d{index}", PROMPT, source=source, await_first_token=True)
    bench.submit("plain", [3, 5], count=6)
    bench.run()
    assert bench.tokens["plain"] == expected_tokens([3, 5], 6)
    first, *rest = expected_tokens(PROMPT, 8)
    for index in range(4):
        bench.core.first_token(f"d{index}", first)
        bench.core.loaded(f"d{index}", 0)
    bench.run()
    for index in range(4):
        assert bench.tokens[f"d{index}"] == rest
    assert pool_is_free(bench)


def test_those_who_await_kv_do_not_wait_behind_a_full_batch(make_bench: MakeBench) -> None:
    """They get their pages; prompts that lack a place keep their order."""
    bench = make_bench(max_batch=1)
    bench.submit("a", [1, 2], count=9)
    bench.core.step()
    source = Source()
    bench.submit("b", [3, 5], count=4)
    bench.submit("c", [4, 7], count=4)
    bench.submit("d", PROMPT, source=source, await_first_token=True)
    bench.submit("e", [8, 9], count=4)
    bench.core.step()
    assert source.blocks, "its KV is asked for"
    assert [sequence.id for sequence in bench.core._scheduler.waiting] == ["b", "c", "e"]
    bench.run()
    ended = [output.sequence.id for output in bench.outputs if output.finish_reason]
    assert ended == ["a", "b", "c", "e"]
    first, *rest = expected_tokens(PROMPT, 8)
    bench.core.first_token("d", first)
    bench.core.loaded("d", 0)
    bench.run()
    assert bench.tokens["d"] == rest
    assert pool_is_free(bench)


def test_source_never_fills_a_page_that_is_shared(make_bench: MakeBench) -> None:
    """With prompt and output cached already, there is nothing to load."""
    bench, source = make_bench(), Source()
    bench.submit("a", PROMPT[:20], count=30)
    bench.run()
    output = expected_tokens(PROMPT[:20], 30)
    bench.submit("b", PROMPT[:20], count=34, output=output[:29], source=source)
    bench.run()
    assert source.blocks == []
    assert bench.tokens["b"] == expected_tokens(PROMPT[:20], 34)[29:]


def test_stop_ends_every_sequence_with_an_error(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.submit("a", [1, 2], count=50)
    bench.core.step()
    bench.core.stop()
    assert isinstance(bench.outputs[-1].error, Unavailable)
    assert pool_is_free(bench)
    with pytest.raises(Unavailable):
        bench.submit("b", [1])


def test_a_step_too_small_for_the_batch_and_a_block_is_refused(make_bench: MakeBench) -> None:
    with pytest.raises(ConfigError, match=r"block_tokens 16 = 32"):
        make_bench(max_batch=16, max_step_tokens=31)


def test_a_short_prompt_does_not_wait_for_a_long_one(make_bench: MakeBench) -> None:
    """What fits beside a prompt of many steps is computed beside it."""
    bench = make_bench(num_pages=512, max_batch=4, max_step_tokens=24)
    bench.submit("long", list(range(240)), count=1)
    bench.core.step()
    bench.submit("short", [3, 5, 7], count=1)
    bench.core.step()
    bench.core.step()
    assert bench.tokens["short"] == expected_tokens([3, 5, 7], 1)
    assert not bench.tokens["long"]
    bench.run()
    assert bench.tokens["long"] == expected_tokens(list(range(240)), 1)


def test_no_more_is_placed_at_once_than_a_step_computes(make_bench: MakeBench) -> None:
    bench = make_bench(num_pages=512, max_step_tokens=64)
    for index in range(9):
        bench.submit(str(index), [index] * 32, count=9)
    running = []
    for _ in range(3):
        bench.core.step()
        running.append(bench.core.stats().running)
    assert running == [2, 4, 6]
    bench.run()
    for index in range(9):
        assert bench.tokens[str(index)] == expected_tokens([index] * 32, 9)
