"""What a client is told: every token once, in order, merged while it is slow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission import Admission
from services.router.choice import NoText, TextStream
from services.router.record import RequestRecord
from services.router.request import Request, sampling_for_workers
from services.router.stream import OutputStream, SlowClient
from splitserve.detokenizer import IncrementalDetokenizer
from splitserve.errors import Unavailable, WorkerLost
from splitserve.obs.metrics import Metrics
from splitserve.sampling import FinishReason, SamplingParams
from splitserve.tokenizer import Tokenizer
from splitserve.v1 import common_pb2

LIMIT = 1000
METRICS = Metrics()
WORDS = ["a", "b", "c", "stop", "d", "e"]


async def open_stream(n: int = 1, texts: list[TextStream] | None = None) -> OutputStream:
    params = SamplingParams(n=n, seed=7, max_tokens=100)
    now = asyncio.get_running_loop().time()
    request = Request(
        id="name",
        key="name@1",
        prompt=[1, 2, 3],
        sampling=params,
        wire_sampling=sampling_for_workers(params),
        cache_salt=b"",
        received_s=now,
        deadline_s=now + 60,
    )
    ticket = await Admission(1, 1, 100).admit(3)
    record = RequestRecord(request, ticket, METRICS, "model")
    return OutputStream(request, texts or [NoText() for _ in range(n)], record, LIMIT)


def tokens(*ids: int) -> list[common_pb2.Token]:
    return [common_pb2.Token(id=token_id) for token_id in ids]


def words(stop: list[str] | None = None) -> IncrementalDetokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")
    )
    backend.decoder = tokenizers.decoders.Fuse()
    return IncrementalDetokenizer(Tokenizer(backend, frozenset()), stop or [])


async def test_merges_what_comes_before_it_is_taken() -> None:
    stream = await open_stream(n=2)
    stream.push(0, 0, tokens(5), None, 4)
    stream.push(1, 0, tokens(6), None, 4)
    stream.push(0, 1, tokens(7, 8), None, 8)
    message = await stream.next_message()
    assert message is not None
    assert [(c.index, c.first_token_index, [t.id for t in c.tokens]) for c in message.choices] == [
        (0, 0, [5, 7, 8]),
        (1, 0, [6]),
    ]
    assert (message.seed, message.request_id) == (7, "name")
    assert stream.pending_bytes == 0


async def test_the_last_message_counts() -> None:
    stream = await open_stream()
    assert not stream.push(0, 0, tokens(5, 6), FinishReason.LENGTH, 8)
    assert stream.finished
    message = await stream.next_message()
    assert message is not None
    assert message.choices[0].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert (message.usage.prompt_tokens, message.usage.completion_tokens) == (3, 2)
    assert await stream.next_message() is None


async def test_waits_for_news() -> None:
    stream = await open_stream()
    waiting = asyncio.create_task(stream.next_message())
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.push(0, 0, tokens(5), None, 4)
    message = await waiting
    assert message is not None
    assert message.choices[0].tokens[0].id == 5


@pytest.mark.parametrize("first", [0, 2])
async def test_neither_gap_nor_duplicate(first: int) -> None:
    stream = await open_stream()
    stream.push(0, 0, tokens(5), None, 4)
    with pytest.raises(WorkerLost):
        stream.push(0, first, tokens(6), None, 4)
    message = await stream.next_message()
    assert message is not None
    assert [token.id for token in message.choices[0].tokens] == [5]


async def test_a_choice_that_is_not_there() -> None:
    stream = await open_stream()
    with pytest.raises(WorkerLost):
        stream.push(1, 0, tokens(5), None, 4)


async def test_news_after_the_end_is_ignored() -> None:
    stream = await open_stream(n=2)
    stream.push(0, 0, tokens(5), FinishReason.STOP, 4)
    assert not stream.push(0, 7, tokens(6), None, 4)
    assert stream.choices[0].token_ids == [5]


async def test_slow_client() -> None:
    stream = await open_stream()
    stream.push(0, 0, tokens(5), None, LIMIT)
    with pytest.raises(SlowClient):
        stream.push(0, 1, tokens(6), None, 1)


async def test_failure_comes_after_what_is_pending() -> None:
    told: list[bool] = []
    stream = await open_stream()
    stream._on_fail = lambda: told.append(True)
    stream.push(0, 0, tokens(5), None, 4)
    stream.fail(Unavailable("gone"))
    stream.fail(Unavailable("again"))
    assert await stream.next_message() is not None
    with pytest.raises(Unavailable, match="gone"):
        await stream.next_message()
    assert told == [True]


async def test_stop_text_ends_a_choice_here() -> None:
    stream = await open_stream(texts=[words(["stop"])])
    assert stream.push(0, 0, tokens(0, 1, 3, 4), None, 16)
    message = await stream.next_message()
    assert message is not None
    assert message.choices[0].text == "ab"
    assert [token.id for token in message.choices[0].tokens] == [0, 1, 3]
    assert message.choices[0].finish_reason == common_pb2.FINISH_REASON_STOP
    assert message.usage.completion_tokens == 3


async def test_held_back_text_comes_at_the_end() -> None:
    stream = await open_stream(texts=[words(["bcd!"])])
    stream.push(0, 0, tokens(0, 1, 2), None, 4)
    message = await stream.next_message()
    assert message is not None
    assert message.choices[0].text == "a"
    stream.push(0, 3, tokens(4), FinishReason.LENGTH, 4)
    message = await stream.next_message()
    assert message is not None
    assert message.choices[0].text == "bcd"


async def test_progress_for_another_worker() -> None:
    stream = await open_stream(n=3)
    stream.push(0, 0, tokens(5, 6), None, 4)
    stream.push(1, 0, tokens(7), FinishReason.STOP, 4)
    progress = [(p.index, list(p.token_ids), p.finished) for p in stream.progress()]
    assert progress == [(0, [5, 6], False), (1, [7], True), (2, [], False)]
    assert stream.started


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_interleaving_gives_every_token_once(data: Any) -> None:
    outputs = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=3))

    async def play() -> None:
        stream = await open_stream(n=len(outputs))
        sent = [0] * len(outputs)
        got: list[list[int]] = [[] for _ in outputs]
        while True:
            open_choices = [i for i, ids in enumerate(outputs) if sent[i] < len(ids)]
            if open_choices and (not stream._pending or data.draw(st.booleans())):
                choice = data.draw(st.sampled_from(open_choices))
                count = data.draw(st.integers(1, len(outputs[choice]) - sent[choice]))
                ids = outputs[choice][sent[choice] : sent[choice] + count]
                last = sent[choice] + count == len(outputs[choice])
                reason = FinishReason.LENGTH if last else None
                stream.push(choice, sent[choice], tokens(*ids), reason, 1)
                sent[choice] += count
                continue
            message = await stream.next_message()
            if message is None:
                break
            for delta in message.choices:
                assert delta.first_token_index == len(got[delta.index])
                got[delta.index] += [token.id for token in delta.tokens]
        assert got == outputs

    asyncio.run(play())
