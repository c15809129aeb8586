"""The sampler against definitions written out naively."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.protocol import Draw
from splitserve.engine.sampler import Sampler, uniform
from splitserve.sampling import SamplingParams

EOS = 3
VOCAB = 24
SAMPLER = Sampler(frozenset({EOS}))


def draw(
    params: SamplingParams, seed: int = 0, choice: int = 0, output: tuple[int, ...] = ()
) -> Draw:
    return Draw(params, seed, choice, prompt=(1, 2, 2), output=output)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tokens(row: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    draws = [draw(params, seed) for seed in range(count)]
    return [t.token_id for t in SAMPLER.draw(row.expand(count, -1), draws)]


def test_greedy_takes_the_most_likely() -> None:
    row = logits(0)
    params = SamplingParams(temperature=0)
    assert tokens(row, params, 2) == [int(row.argmax())] * 2


def test_frequencies_follow_the_softmax() -> None:
    row, count, temperature = logits(1), 4000, 0.7
    seen = Counter(tokens(row, SamplingParams(temperature=temperature), count))
    for token, prob in enumerate(torch.softmax(row / temperature, -1).tolist()):
        # Five standard deviations of a binomial count; seeds are fixed, so this never flakes.
        slack = 5 * math.sqrt(count * prob * (1 - prob)) + 1
        assert abs(seen[token] - count * prob) <= slack


def naive_allowed(row: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    probs = torch.softmax(row.double(), -1).tolist()
    ranked = sorted(range(VOCAB), key=lambda t: (-probs[t], t))[: top_k or VOCAB]
    total, kept, reached = sum(probs[t] for t in ranked), set(), 0.0
    for token in ranked:
        if reached >= top_p * total:
            break
        kept.add(token)
        reached += probs[token]
    return {t for t in kept if probs[t] >= min_p * probs[ranked[0]]}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_truncation_keeps_just_the_allowed(
    seed: int, top_k: int, top_p: float, min_p: float
) -> None:
    row = logits(seed)
    allowed = naive_allowed(row, top_k, top_p, min_p)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = set(tokens(row, params, 60))
    assert drawn <= allowed
    if len(allowed) == 1:
        assert drawn == allowed


def test_repetition_penalty_covers_prompt_and_output() -> None:
    row = torch.zeros(VOCAB)
    row[1], row[5], row[7] = 4.0, 3.0, 2.5
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert SAMPLER.draw(row[None], [draw(params, output=(5,))])[0].token_id == 7


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    row = torch.full((VOCAB,), -1.0)
    row[1] = -0.6
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert SAMPLER.draw(row[None], [draw(params)])[0].token_id == 0


def test_presence_and_frequency_count_output_only() -> None:
    row = torch.zeros(VOCAB)
    row[1], row[5], row[7] = 4.0, 5.0, 4.5
    params = SamplingParams(temperature=0, presence_penalty=0.25, frequency_penalty=0.5)
    once = SAMPLER.draw(row[None], [draw(params, output=(5,))])[0].token_id
    twice = SAMPLER.draw(row[None], [draw(params, output=(5, 5, 7))])[0].token_id
    assert (once, twice) == (7, 1), "token 1 is in the prompt only and keeps its 4.0"


def test_min_tokens_forbids_ends() -> None:
    row = torch.zeros(VOCAB)
    row[EOS], row[8], row[9] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[8])
    ids = [SAMPLER.draw(row[None], [draw(params, output=(0,) * n)])[0].token_id for n in range(4)]
    assert ids == [9, 9, EOS, EOS]


def test_logprobs_are_of_the_raw_distribution() -> None:
    row = logits(4)
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=1.5, logprobs=3)
    token = SAMPLER.draw(row[None], [draw(params)])[0]
    expected = torch.log_softmax(row, -1)
    assert token.logprob == pytest.approx(float(expected[token.token_id]))
    best = expected.topk(3)
    assert [t.token_id for t in token.top] == best.indices.tolist()
    assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = torch.stack([logits(s) for s in range(6)])
    params = SamplingParams(temperature=0.9, top_p=0.9, logprobs=2)
    draws = [draw(params, seed=s) for s in range(6)]
    together = SAMPLER.draw(rows, draws)
    alone = [SAMPLER.draw(rows[i : i + 1], draws[i : i + 1])[0] for i in range(6)]
    assert together == alone


@given(st.integers(0, 2**64 - 1), st.integers(0, 15), st.integers(0, 2**40))
def test_uniform_is_a_function_in_range(seed: int, choice: int, index: int) -> None:
    value = uniform(seed, choice, index)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, choice, index)
    assert value != uniform(seed, choice + 1, index)


def test_uniform_is_uniform() -> None:
    values = [uniform(7, 0, index) for index in range(4000)]
    assert sum(values) / 4000 == pytest.approx(0.5, abs=0.02)
    assert max(Counter(int(v * 10) for v in values).values()) < 480


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=5e-324), SamplingParams(repetition_penalty=5e-324, top_p=0.9)],
)
def test_the_least_values_leave_numbers(params: SamplingParams) -> None:
    row = torch.full((VOCAB,), -5.0)
    row[2], row[9] = 4.0, 3.0
    assert tokens(row, params, 3) == [2] * 3


def test_more_log_probabilities_than_tokens() -> None:
    few = Sampler(frozenset({EOS}))
    [drawn] = few.draw(torch.zeros(1, 4), [draw(SamplingParams(temperature=0, logprobs=20))])
    assert len(drawn.top) == 4
