from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.penalties import (
    forbid,
    forbid_reference,
    penalise,
    penalise_reference,
)
from torch import Tensor

from splitserve.engine import sampler
from splitserve.engine.protocol import Draw
from splitserve.sampling import SamplingParams

VOCAB = 1500
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40) | st.just(list(range(1400)))


def lists_of(draws: list[Draw], *, newest_apart: bool) -> tuple[Tensor, ...]:
    """The kernel's lists, then the tokens that are in none of their counts."""
    starts, tokens, counts, newest = [0], list[int](), list[int](), []
    for draw in draws:
        output = list(draw.output)
        newest.append(output.pop() if newest_apart and output else -1)
        times = Counter(dict.fromkeys(draw.prompt, 0))
        times.update(output)
        tokens += times.keys()
        counts += times.values()
        starts.append(len(tokens))
    # What is past the end is never read.
    lists = ([*tokens, 10**9], [*counts, 10**9])
    return (
        torch.tensor(starts, dtype=torch.int32),
        *(torch.tensor(part, dtype=torch.int32) for part in lists),
        torch.tensor(newest),
    )


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of what is cut off after
@settings(max_examples=30, deadline=None)
@given(
    sequences=st.lists(st.tuples(PROMPTS, TOKENS), min_size=1, max_size=3),
    repetition=st.sampled_from([1.0, 0.5, 1.75, 1e-38]),
    presence=st.sampled_from([0.0, 0.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.125]),
    newest_apart=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_sampler(
    sequences: list[tuple[list[int], list[int]]],
    repetition: float,
    presence: float,
    frequency: float,
    newest_apart: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(sequences), VOCAB) * 5
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    draws = [Draw(params, 0, 0, prompt, output) for prompt, output in sequences]
    expected = logits.clone()
    for row, draw in zip(expected, draws, strict=True):
        sampler._penalise(row, draw)
    starts, tokens, counts, newest = lists_of(draws, newest_apart=newest_apart)
    penalties = [torch.full((len(draws),), float(x)) for x in (repetition, presence, frequency)]
    lists = (starts, tokens, counts, *penalties, newest if newest_apart else None)
    by_reference = logits.clone()
    penalise_reference(by_reference, *lists)
    penalise(logits, *lists)
    torch.testing.assert_close(logits, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(by_reference, expected, rtol=2e-6, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]]).half()
    lists = (torch.tensor([0, 2]).int(), torch.tensor([1, 0]).int(), torch.tensor([0, 3]).int())
    penalties = (torch.tensor([3.0]), torch.tensor([0.5]), torch.tensor([0.1]))
    penalise(logits, *lists, *penalties)
    assert torch.equal(logits, torch.tensor([[2 / 3 - 0.8, -6.0, 1.0]]).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forbidden_tokens(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 700).to(dtype)
    lists = [[5], [], list(range(0, 700, 3))]
    starts = torch.tensor([0, *(len(part) for part in lists)]).cumsum(0).int()
    tokens = torch.tensor([*lists[0], *lists[2], 3], dtype=torch.int32)
    expected = logits.clone()
    forbid_reference(expected, starts, tokens)
    forbid(logits, starts, tokens)
    assert torch.equal(logits, expected)
    assert logits.isneginf().sum(1).tolist() == [1, 0, 234]


def test_what_does_not_fit_is_refused() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="starts"):
        forbid(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int32), none)
    with pytest.raises(ValueError, match="int32"):
        forbid(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int32), none.long())
