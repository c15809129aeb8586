"""Prompts as requests, and messages as deltas."""

from __future__ import annotations

import pytest

from splitserve.errors import InvalidRequest
from splitserve.inference_wire import delta_from_proto, generate_request
from splitserve.sampling import SamplingParams
from splitserve.v1 import common_pb2, inference_pb2


def test_each_kind_of_prompt_takes_its_own_field():
    assert generate_request("hi", None).text == "hi"
    assert list(generate_request([1, 2], None).tokens.ids) == [1, 2]
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = generate_request(turns, None).chat
    assert [(m.role, m.content) for m in chat.messages] == [("system", "be brief"), ("user", "hi")]


def test_an_empty_list_is_a_prompt_of_no_tokens():
    assert generate_request([], None).WhichOneof("prompt") == "tokens"


def test_parameters_names_and_flags_travel():
    request = generate_request(
        [1], SamplingParams(temperature=0.0, seed=3), model="m", request_id="r"
    )
    assert (request.model, request.request_id) == ("m", "r")
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 3)
    assert not request.HasField("keep_special_tokens")
    assert generate_request([1], None, keep_special_tokens=True).keep_special_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        [-1],
        [2**32],
        ["a"],
        [{"role": "user"}],
        [{"role": "user", "content": "x"}, 3],
        "\ud800",
        7,
        None,
    ],
)
def test_a_prompt_that_no_message_can_hold_is_refused(prompt: object):
    with pytest.raises(InvalidRequest, match=r"^prompt: cannot be sent"):
        generate_request(prompt, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(seed=-1), SamplingParams(top_k=2**40), SamplingParams(stop=["\ud800"])],
)
def test_parameters_that_no_message_can_hold_are_refused(params: SamplingParams):
    with pytest.raises(InvalidRequest, match=r"^sampling: cannot be sent"):
        generate_request([1], params)


def test_a_message_becomes_a_delta():
    logprobs = common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=5, logprob=-0.25),
        top=[common_pb2.TokenLogprob(token_id=6, logprob=-0.125)],
    )
    message = inference_pb2.GenerateResponse(
        request_id="r",
        choices=[
            inference_pb2.ChoiceDelta(
                index=1,
                first_token_index=4,
                tokens=[common_pb2.Token(id=5, logprobs=logprobs)],
                text="t",
                finish_reason=common_pb2.FINISH_REASON_LENGTH,
            )
        ],
        usage=inference_pb2.Usage(prompt_tokens=1, cached_prompt_tokens=2, completion_tokens=3),
        timings=inference_pb2.Timings(time_to_first_token_ms=1.5, total_ms=2.5),
    )
    delta = delta_from_proto(message)
    [choice] = delta.choices
    assert (choice.index, choice.first_token_index, choice.token_ids) == (1, 4, [5])
    assert (choice.text, choice.finish_reason) == ("t", "length")
    assert choice.logprobs is not None
    assert choice.logprobs[0].chosen.logprob == -0.25
    assert choice.logprobs[0].top[0].token_id == 6
    assert delta.usage is not None
    assert delta.usage.cached_prompt_tokens == 2
    assert delta.timings is not None
    assert delta.timings.total_ms == 2.5
    assert delta.seed is None


def test_a_choice_that_goes_on_has_no_reason_and_no_logprobs():
    message = inference_pb2.GenerateResponse(
        choices=[inference_pb2.ChoiceDelta(tokens=[common_pb2.Token(id=5)])]
    )
    [choice] = delta_from_proto(message).choices
    assert choice.finish_reason is None
    assert choice.logprobs is None
