from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode.outbox import Outbox, TaggedToken
from splitserve.errors import Overloaded
from splitserve.v1 import common_pb2, decode_pb2


def delta(request_id: str, first: int, *tokens: int, **fields: object) -> decode_pb2.SequenceDelta:
    return decode_pb2.SequenceDelta(
        request_id=request_id,
        first_token_index=first,
        tokens=[common_pb2.Token(id=token) for token in tokens],
        **fields,
    )


async def test_one_message_has_all_the_news_of_a_step() -> None:
    outbox = Outbox(100)
    outbox.put(7, delta("a", 0, 1, cached_tokens=5))
    outbox.put(7, delta("b", 3, 2))
    message = await outbox.take()
    assert message is not None
    assert message.step == 7
    assert [(d.request_id, d.first_token_index) for d in message.deltas] == [("a", 0), ("b", 3)]
    assert message.deltas[0].cached_tokens == 5
    assert len(outbox) == 0


async def test_take_waits_for_news_and_ends_after_close() -> None:
    outbox = Outbox(100)
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done()
    outbox.put(1, delta("a", 0, 1))
    assert await taking is not None
    outbox.put(2, delta("a", 1, 2))
    outbox.close()
    assert await outbox.take() is not None
    assert await outbox.take() is None


# Which of three choices each step gives a token to, and whether in short; after which steps the
# router reads.
steps = st.lists(
    st.tuples(st.dictionaries(st.integers(0, 2), st.booleans(), min_size=1), st.booleans()),
    max_size=40,
)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_merging_loses_no_token_and_no_order(plan: list[tuple[dict[int, bool], bool]]) -> None:
    async def run() -> None:
        outbox, sent, read = Outbox(1000), {}, {}
        for step, (choices, reads) in enumerate(plan):
            for choice, in_short in choices.items():
                tokens = sent.setdefault(choice, [])
                if in_short:
                    token = TaggedToken(TAG + choice, len(tokens), step)
                    outbox.put_token(step, "a", choice, token)
                else:
                    news = delta("a", len(tokens), step)
                    news.choice = choice
                    outbox.put(step, news)
                tokens.append(step)
            if reads:
                await take_into(outbox, read)
        outbox.close()
        while await take_into(outbox, read):
            pass
        assert read == sent

    asyncio.run(run())


TAG = 70


async def take_into(outbox: Outbox, read: dict[int, list[int]]) -> bool:
    message = await outbox.take()
    if message is None:
        return False
    seen = [d.choice for d in message.deltas]
    seen += [tag - TAG for tag in message.tokens.tags]
    assert len(seen) == len(set(seen)), "at most one entry a choice"
    for d in message.deltas:
        tokens = read.setdefault(d.choice, [])
        assert d.first_token_index == len(tokens)
        tokens += [token.id for token in d.tokens]
    news = message.tokens
    for tag, index, token in zip(news.tags, news.token_indexes, news.token_ids, strict=True):
        tokens = read.setdefault(tag - TAG, [])
        assert index == len(tokens)
        tokens.append(token)
    return True


async def test_news_of_one_step_are_told_in_short() -> None:
    outbox = Outbox(100)
    outbox.put_token(3, "a", 0, TaggedToken(5, 8, 41))
    outbox.put_token(3, "b", 1, TaggedToken(9, 2, 0))
    message = await outbox.take()
    assert message == decode_pb2.AttachResponse(
        step=3,
        tokens=decode_pb2.StepTokens(tags=[5, 9], token_indexes=[8, 2], token_ids=[41, 0]),
    )


async def test_an_end_is_merged_into_a_token_that_waits() -> None:
    outbox = Outbox(100)
    outbox.put_token(1, "a", 0, TaggedToken(5, 8, 41))
    outbox.put(2, delta("a", 9, 42, finish_reason=common_pb2.FINISH_REASON_STOP))
    message = await outbox.take()
    assert message is not None
    assert not message.tokens.tags
    (one,) = message.deltas
    assert (one.first_token_index, [token.id for token in one.tokens]) == (8, [41, 42])
    assert one.finish_reason == common_pb2.FINISH_REASON_STOP


async def test_the_end_is_merged_into_what_waits() -> None:
    outbox = Outbox(100)
    outbox.put(1, delta("a", 0, 1, 2))
    outbox.put(2, delta("a", 2, finish_reason=common_pb2.FINISH_REASON_STOP))
    outbox.put(2, delta("b", 0, error=decode_pb2.SequenceError(code=4, message="late")))
    message = await outbox.take()
    assert message is not None
    first, second = message.deltas
    assert ([t.id for t in first.tokens], first.finish_reason) == ([1, 2], 1)
    assert second.error.message == "late"


async def test_why_a_choice_ended_is_not_overwritten() -> None:
    """A `Start` that crosses the deadline on its way is answered NOT_FOUND."""
    outbox = Outbox(100)
    outbox.put(1, delta("a", 0, 4))
    outbox.put(0, delta("a", 0, error=decode_pb2.SequenceError(code=4, message="late")))
    outbox.put(0, delta("a", 0, error=decode_pb2.SequenceError(code=5, message="unknown")))
    message = await outbox.take()
    assert message is not None
    assert [token.id for token in message.deltas[0].tokens] == [4]
    assert message.deltas[0].error.message == "late"


async def test_a_backlog_is_bounded() -> None:
    outbox = Outbox(10)
    for index in range(9):
        outbox.put_token(index, "a", 0, TaggedToken(1, index, index))
    assert not outbox.overfull
    outbox.put(9, delta("a", 9, 9))
    assert outbox.overfull
    with pytest.raises(Overloaded):
        await outbox.take()


async def test_what_is_forgotten_does_not_count() -> None:
    outbox = Outbox(10)
    outbox.put(1, delta("a", 0, *range(20)))
    outbox.put_token(1, "c", 0, TaggedToken(1, 3, 3))
    outbox.forget("a", 0)
    outbox.forget("c", 0)
    outbox.forget("unknown", 0)
    assert not outbox.overfull
    outbox.put(2, delta("b", 0, 1))
    message = await outbox.take()
    assert message is not None
    assert [d.request_id for d in message.deltas] == ["b"]
