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
from .front_door import (
    CONTEXT,
    MAX_TOKENS,
    VOCAB,
    FrontDoor,
    Request,
    fields_of,
    front_door,
    tokens,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOT_FOUND = grpc.StatusCode.NOT_FOUND
INVALID = grpc.StatusCode.INVALID_ARGUMENT
fuzzed = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WILD_NUMBER = st.floats() | st.floats(-3, 3)
WILD_COUNT = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 25)


def mostly(good: Any, wild: Any) -> Any:
    """Fifteen times of sixteen what a server takes, or with so many fields none would be taken."""
    return st.integers(0, 15).flatmap(lambda dice: good if dice else wild)


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": mostly(st.floats(0, 1e6), WILD_NUMBER),
        "top_p": mostly(st.floats(0, 1, exclude_min=True), WILD_NUMBER),
        "top_k": mostly(st.integers(0, 2**31 - 1), WILD_COUNT),
        "min_p": mostly(st.floats(0, 1), WILD_NUMBER),
        "repetition_penalty": mostly(st.floats(0, 10, exclude_min=True), WILD_NUMBER),
        "presence_penalty": mostly(st.floats(-2, 2), WILD_NUMBER),
        "frequency_penalty": mostly(st.floats(-2, 2), WILD_NUMBER),
        "seed": st.integers(0, 2**64 - 1),
        "stop": mostly(st.lists(st.text(min_size=1, max_size=5), max_size=16), st.just([""])),
        "stop_token_ids": st.lists(mostly(st.integers(0, VOCAB - 1), st.just(VOCAB)), max_size=9),
        "max_tokens": mostly(st.integers(1, MAX_TOKENS), WILD_COUNT),
        "min_tokens": mostly(st.just(0), WILD_COUNT),
        "ignore_eos": st.booleans(),
        "logprobs": mostly(st.integers(0, 20), WILD_COUNT),
        "n": mostly(st.integers(1, 16), WILD_COUNT),
    },
)
TOKENS = mostly(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT // 2),
    st.lists(st.integers(0, VOCAB), max_size=CONTEXT + 2),
)
TURNS = st.lists(
    st.builds(
        inference_pb2.ChatMessage,
        role=mostly(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=9)),
        content=st.text(max_size=20),
    ),
    max_size=3,
)
PROMPT = st.one_of(
    mostly(st.just({"text": "1 2 3"}), st.just({})),
    st.text(max_size=60).map(lambda text: {"text": text}),
    TOKENS.map(lambda ids: {"tokens": inference_pb2.TokenPrompt(ids=ids)}),
    TURNS.map(lambda turns: {"chat": inference_pb2.ChatPrompt(messages=turns)}),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any message of the type; many are good ones, and more are nearly so."""
    return Request(
        model=draw(mostly(st.sampled_from(["", "toy"]), st.text(max_size=9))),
        request_id=draw(mostly(st.text("abc 1~", max_size=128), st.text(max_size=130))),
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
    error = await door.send(request)
    if error is None:
        choices = request.sampling.n if request.sampling.HasField("n") else 1
        assert_whole(await door.ask(request), choices)
        return
    assert error.code() in (INVALID, NOT_FOUND), error
    assert (error.code() is NOT_FOUND) is (request.model not in ("", "toy"))
    assert (error.code() is INVALID) is bool(fields_of(error))


@fuzzed
@given(noise=st.binary(max_size=60), at=st.integers(0, 80), cut=st.integers(0, 80))
async def test_any_bytes(door: FrontDoor, noise: bytes, at: int, cut: int) -> None:
    whole = tokens(list(range(1, 50)), stop=["a b"]).SerializeToString()
    error = await door.send(whole[:at] + noise + whole[at + cut :])
    assert error is None or error.code() in (INVALID, NOT_FOUND), error


async def test_nothing_is_left(door: FrontDoor) -> None:
    await door.assert_unharmed()
