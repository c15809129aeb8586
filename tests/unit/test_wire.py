from __future__ import annotations

import math
import struct

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve import wire
from splitserve.engine.protocol import DrawnToken, Logprob
from splitserve.errors import (
    BlockCorrupt,
    BlockNotFound,
    DeadlineExceeded,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    RequestCancelled,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)
from splitserve.sampling import FinishReason, SamplingParams
from splitserve.v1 import common_pb2, decode_pb2

float32 = st.floats(allow_nan=False, width=32)
float64 = st.floats(allow_nan=False)
token_ids = st.integers(0, 2**32 - 1)

sampling_params = st.builds(
    SamplingParams,
    temperature=float64,
    top_p=float64,
    top_k=st.integers(-(2**31), 2**31 - 1),
    min_p=float64,
    repetition_penalty=float64,
    presence_penalty=float64,
    frequency_penalty=float64,
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(max_size=5), max_size=3),
    stop_token_ids=st.lists(token_ids, max_size=3),
    max_tokens=st.none() | st.integers(-(2**31), 2**31 - 1),
    min_tokens=st.integers(-(2**31), 2**31 - 1),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(-(2**31), 2**31 - 1),
    n=st.integers(-(2**31), 2**31 - 1),
)
logprobs = st.builds(Logprob, token_ids, float32)
drawn_tokens = token_ids.map(DrawnToken) | st.builds(
    DrawnToken, token_ids, float32, st.lists(logprobs, max_size=3).map(tuple)
)


@given(sampling_params)
@settings(max_examples=50, deadline=None)
def test_sampling_survives_the_way(params: SamplingParams) -> None:
    data = wire.sampling_to_proto(params).SerializeToString()
    assert wire.sampling_from_proto(common_pb2.SamplingParams.FromString(data)) == params


def test_unset_fields_take_the_defaults() -> None:
    assert wire.sampling_from_proto(common_pb2.SamplingParams()) == SamplingParams()


def test_not_a_number_arrives_as_such_and_is_found_later() -> None:
    params = wire.sampling_from_proto(common_pb2.SamplingParams(temperature=math.nan))
    assert math.isnan(params.temperature)


def test_a_seed_must_have_been_decided() -> None:
    assert wire.seed_of(common_pb2.SamplingParams(seed=0)) == 0
    with pytest.raises(InvalidRequest, match=r"sampling\.seed"):
        wire.seed_of(common_pb2.SamplingParams())


@given(drawn_tokens)
@settings(max_examples=50, deadline=None)
def test_tokens_and_logprobs_survive_bit_by_bit(token: DrawnToken) -> None:
    data = wire.token_to_proto(token).SerializeToString()
    back = wire.token_from_proto(common_pb2.Token.FromString(data))
    assert back == token
    if token.logprob is not None and back.logprob is not None:
        assert struct.pack("<f", back.logprob) == struct.pack("<f", token.logprob)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_survive(reason: FinishReason | None) -> None:
    assert wire.finish_reason_from_proto(wire.finish_reason_to_proto(reason)) is reason


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest.single("a", "b"),
        BlockNotFound("m"),
        Unauthenticated("m"),
        Overloaded("m"),
        DeadlineExceeded("m"),
        RequestCancelled("m"),
        Unavailable("m"),
        LeaseEnded("m"),
        BlockCorrupt("m"),
        SplitserveError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_class_and_message(error: SplitserveError) -> None:
    back = wire.error_from_proto(wire.error_to_proto(error))
    assert type(back) is type(error)
    assert error.message in back.message


def test_a_code_of_no_class_is_a_plain_error() -> None:
    for code in (grpc.StatusCode.ABORTED.value[0], 99, -1):
        error = wire.error_from_proto(decode_pb2.SequenceError(code=code, message="m"))
        assert type(error) is SplitserveError
