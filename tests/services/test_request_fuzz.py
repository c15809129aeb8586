"""Requests that nobody thought of: only documented statuses come back, and streams keep G4."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.v1 import common_pb2, inference_pb2

from ..suite import Suite
from .front_door import CONTEXT, VOCAB, FrontDoor, Request, fields_of, front_door, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOT_FOUND = grpc.StatusCode.NOT_FOUND
INVALID = grpc.StatusCode.INVALID_ARGUMENT
fuzzed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBER = st.floats() | st.floats(-3, 3) | st.just(1.0)
COUNT = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 20) | st.just(1)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": NUMBER,
        "top_p": NUMBER,
        "top_k": COUNT,
        "min_p": NUMBER,
        "repetition_penalty": NUMBER,
        "presence_penalty": NUMBER,
        "frequency_penalty": NUMBER,
        "seed": st.integers(0, 2**64 - 1),
        "stop": st.lists(st.text(max_size=5), max_size=18),
        "stop_token_ids": st.lists(st.integers(0, VOCAB + 1), max_size=66),
        "max_tokens": COUNT,
        "min_tokens": COUNT,
        "ignore_eos": st.booleans(),
        "logprobs": COUNT,
        "n": COUNT,
    },
)
TOKENS = st.lists(st.integers(0, VOCAB), max_size=CONTEXT + 2)
TURNS = st.lists(
    st.builds(
        inference_pb2.ChatMessage,
        role=st.sampled_from(["system", "user", "assistant", "wizard"]),
        content=st.text(max_size=20),
    ),
    max_size=3,
)
PROMPT = st.one_of(
    st.just({}),
    st.text(max_size=60).map(lambda text: {"text": text}),
    TOKENS.map(lambda ids: {"tokens": inference_pb2.TokenPrompt(ids=ids)}),
    TURNS.map(lambda turns: {"chat": inference_pb2.ChatPrompt(messages=turns)}),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any message of the type; many are good ones, and more are nearly so."""
    return Request(
        model=draw(st.sampled_from(["", "", "toy", "other"]) | st.text(max_size=9)),
        request_id=draw(st.text(st.characters(codec="ascii"), max_size=9) | st.text(max_size=130)),
        sampling=common_pb2.SamplingParams(**draw(SAMPLING)),
        keep_special_tokens=draw(st.none() | st.booleans()),
        **draw(PROMPT),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FrontDoor]:
    suite = Suite(tmp_path_factory.mktemp("suite"))
    try:
        async with front_door(suite) as opened:
            yield opened
    finally:
        await suite.close()


def assert_whole(messages: list[inference_pb2.GenerateResponse], choices: int) -> None:
    """Indexes without gap or duplicate, one end for each choice, counts in the last message."""
    seen: Counter[int] = Counter()
    ends: Counter[int] = Counter()
    for message in messages:
        for delta in message.choices:
            assert delta.first_token_index == seen[delta.index] or not delta.tokens
            seen[delta.index] += len(delta.tokens)
            ends[delta.index] += bool(delta.finish_reason)
    assert ends == dict.fromkeys(range(choices), 1)
    assert [message.HasField("usage") for message in messages].count(True) == 1
    assert messages[-1].usage.completion_tokens == seen.total()


@fuzzed
@given(request=requests())
async def test_any_message(door: FrontDoor, request: Any) -> None:
    try:
        messages = await door.ask(request)
    except grpc.aio.AioRpcError as error:
        assert error.code() in (INVALID, NOT_FOUND), error
        assert (error.code() is NOT_FOUND) is (request.model not in ("", "toy"))
        assert (error.code() is INVALID) is bool(fields_of(error))
    else:
        assert_whole(messages, request.sampling.n if request.sampling.HasField("n") else 1)


@fuzzed
@given(noise=st.binary(max_size=60), at=st.integers(0, 80), cut=st.integers(0, 80))
async def test_any_bytes(door: FrontDoor, noise: bytes, at: int, cut: int) -> None:
    whole = tokens(list(range(1, 50)), stop=["a b"]).SerializeToString()
    error = await door.send(whole[:at] + noise + whole[at + cut :])
    assert error is None or error.code() in (INVALID, NOT_FOUND), error


async def test_nothing_is_left(door: FrontDoor) -> None:
    await door.assert_unharmed()
