"""Messages of `InferenceService` as its clients see them: prompts out, deltas in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from splitserve.engine.protocol import Logprob
from splitserve.errors import InvalidRequest
from splitserve.outputs import (
    ChoiceDelta,
    FinishName,
    OutputDelta,
    PositionLogprobs,
    Timings,
    Usage,
)
from splitserve.sampling import SamplingParams
from splitserve.v1 import common_pb2, inference_pb2
from splitserve.wire import finish_reason_from_proto, sampling_to_proto

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the turns of a conversation, each with a role and a content."""


@dataclass(frozen=True)
class ModelCard:
    """One model that a router serves."""

    name: str
    max_context_tokens: int
    vocab_size: int
    has_tokenizer: bool
    has_chat_template: bool
    ready: bool


def generate_request(
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    model: str = "",
    request_id: str = "",
    keep_special_tokens: bool = False,
) -> inference_pb2.GenerateRequest:
    """The request as it is sent. Ranges are the server's to check.

    Raises InvalidRequest for what no message can hold: a negative token id, text that is not
    Unicode, a prompt of the wrong type.
    """
    try:
        request = inference_pb2.GenerateRequest(
            model=model,
            request_id=request_id,
            sampling=sampling_to_proto(params or SamplingParams()),
            keep_special_tokens=keep_special_tokens or None,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest.single("sampling", f"cannot be sent: {error}") from error
    try:
        _set_prompt(request, prompt)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidRequest.single("prompt", f"cannot be sent: {error!r}") from error
    return request


def delta_from_proto(message: inference_pb2.GenerateResponse) -> OutputDelta:
    """What is new since the last message."""
    return OutputDelta(
        request_id=message.request_id,
        choices=[_choice(choice) for choice in message.choices],
        usage=_usage(message.usage) if message.HasField("usage") else None,
        timings=_timings(message.timings) if message.HasField("timings") else None,
        seed=message.seed if message.HasField("seed") else None,
    )


def models_from_proto(message: inference_pb2.ListModelsResponse) -> list[ModelCard]:
    """Every model served."""
    return [
        ModelCard(
            name=model.name,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
            has_tokenizer=model.has_tokenizer,
            has_chat_template=model.has_chat_template,
            ready=model.ready,
        )
        for model in message.models
    ]


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    turns = [each for each in prompt if isinstance(each, Mapping)]
    if turns:
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=turn["role"], content=turn["content"]) for turn in turns
        )
        if len(turns) != len(prompt):
            raise TypeError("a conversation holds turns only")
        return
    # Chosen even where there are none, so that the server says what is missing.
    request.tokens.SetInParent()
    request.tokens.ids.extend(each for each in prompt if not isinstance(each, Mapping))


def _choice(message: inference_pb2.ChoiceDelta) -> ChoiceDelta:
    reason = finish_reason_from_proto(message.finish_reason)
    name: FinishName | None = reason.value if reason is not None else None
    logprobs = [_logprobs(t.logprobs) for t in message.tokens if t.HasField("logprobs")]
    return ChoiceDelta(
        index=message.index,
        first_token_index=message.first_token_index,
        token_ids=[token.id for token in message.tokens],
        logprobs=logprobs or None,
        text=message.text,
        finish_reason=name,
    )


def _logprobs(message: common_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=Logprob(message.chosen.token_id, message.chosen.logprob),
        top=tuple(Logprob(each.token_id, each.logprob) for each in message.top),
    )


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
        completion_tokens=message.completion_tokens,
    )


def _timings(message: inference_pb2.Timings) -> Timings:
    return Timings(
        time_to_first_token_ms=message.time_to_first_token_ms,
        total_ms=message.total_ms,
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        decode_ms=message.decode_ms,
    )
