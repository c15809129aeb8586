"""Every range of the sampling parameters, and when a choice ends."""

from __future__ import annotations

import math
from typing import Any

import pytest

from splitserve.errors import InvalidRequest
from splitserve.sampling import FinishReason, SamplingLimits, SamplingParams, check_prompt

LIMITS = SamplingLimits(vocab_size=100, max_context_tokens=50, max_tokens=20, max_choices=4)
EOS = frozenset({2})

GOOD: dict[str, list[Any]] = {
    "temperature": [0.0, 0.7, 100.0],
    "top_p": [1e-6, 1.0],
    "top_k": [0, 1, 10**6],
    "min_p": [0.0, 1.0],
    "repetition_penalty": [0.01, 10.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "seed": [0, 2**64 - 1],
    "stop": [["x"] * 16, ["x" * 256], "one"],
    "stop_token_ids": [[0, 99], [1] * 64],
    "max_tokens": [1, 20],
    "min_tokens": [0, 20],
    "logprobs": [0, 20],
    "n": [1, 4],
}
BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, math.nan, math.inf],
    "top_p": [0.0, 1.01, math.nan, -1.0],
    "top_k": [-1],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1.0, 10.1, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "seed": [-1, 2**64],
    "stop": [["x"] * 17, ["x" * 257], ["é" * 129], [""]],
    "stop_token_ids": [[100], [-1], [1] * 65],
    "max_tokens": [0, -1, 21],
    "min_tokens": [-1, 21],
    "logprobs": [-1, 21],
    "n": [0, -1, 5],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_in_range(name: str, value: Any) -> None:
    assert SamplingParams(**{name: value}).violations(LIMITS) == []


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_out_of_range(name: str, value: Any) -> None:
    found = SamplingParams(**{name: value}).violations(LIMITS, prefix="s")
    assert [violation.field for violation in found] == [f"s.{name}"]


def test_min_tokens_within_max_tokens() -> None:
    found = SamplingParams(max_tokens=3, min_tokens=4).violations(LIMITS)
    assert [violation.field for violation in found] == ["sampling.min_tokens"]


def test_all_faults_are_named() -> None:
    found = SamplingParams(top_p=0.0, n=9, max_tokens=-5).violations(LIMITS)
    assert {violation.field for violation in found} == {
        "sampling.top_p",
        "sampling.n",
        "sampling.max_tokens",
    }


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "at_fault"),
    [
        ([], 1, True),
        ([100], 1, True),
        ([-1], 1, True),
        ([1] * 31, 20, True),
        ([1] * 30, 20, False),
        ([1] * 50, None, True),
        ([1] * 49, None, False),
    ],
)
def test_prompts(prompt: list[int], max_tokens: int | None, at_fault: bool) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    if not at_fault:
        check_prompt(prompt, params, LIMITS, "text")
        return
    with pytest.raises(InvalidRequest) as caught:
        check_prompt(prompt, params, LIMITS, "text")
    assert [violation.field for violation in caught.value.violations] == ["text"]


@pytest.mark.parametrize(
    ("fields", "token", "count", "reason"),
    [
        ({}, 2, 1, FinishReason.STOP),
        ({}, 3, 1, None),
        ({"ignore_eos": True}, 2, 1, None),
        ({"min_tokens": 2}, 2, 1, None),
        ({"min_tokens": 2}, 2, 2, FinishReason.STOP),
        ({"stop_token_ids": [7]}, 7, 1, FinishReason.STOP),
        ({"stop_token_ids": [7], "ignore_eos": True}, 7, 1, FinishReason.STOP),
        ({"max_tokens": 3}, 5, 3, FinishReason.LENGTH),
        ({"max_tokens": 3}, 2, 3, FinishReason.STOP),
        ({"max_tokens": 3}, 5, 2, None),
    ],
)
def test_ends(fields: dict[str, Any], token: int, count: int, reason: FinishReason | None) -> None:
    assert SamplingParams(**fields).finish_after(token, count, EOS) is reason
