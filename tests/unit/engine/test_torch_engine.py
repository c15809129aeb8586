"""The torch engine on a tiny random model: its two modes against each other and themselves."""

from collections import abc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.protocol import Draw, DrawnToken, Slice
from splitserve.engine.sequence import Sequence
from splitserve.engine.torch_engine import TorchEngine
from splitserve.sampling import SamplingParams

from ...tiny_model import make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=120)


def step_alone(engine: TorchEngine, tokens: list[int], start: int, pages: list[int]) -> DrawnToken:
    draws = [Draw(GREEDY, 0, 0, tokens, ())]
    [[token]] = engine.step([Slice(tokens, start, pages, draws)])
    return token


def by_token(token: DrawnToken) -> torch.Tensor:
    values = torch.empty(len(token.top))
    for entry in token.top:
        values[entry.token_id] = entry.logprob
    return values


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_are_wanted_are_what_they_would_be_among_all(deterministic: bool) -> None:
    """Two chunks with draws, of which one draws twice, and one without."""
    engine = make_engine(deterministic=deterministic)
    prompts = [[(k * i) % 120 for i in range(11)] for k in (3, 5, 7)]
    pages = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    draw = Draw(GREEDY, 0, 0, (), ())
    draws: list[list[Draw]] = [[draw], [], [draw, draw]]
    slices = [Slice(p, 0, own, d) for p, own, d in zip(prompts, pages, draws, strict=True)]
    found = engine.compute(slices)
    assert found is not None
    alone = [make_engine(deterministic=deterministic).score(part)[-1] for part in slices]
    expected = torch.stack([alone[0], alone[2], alone[2]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert engine.compute(slices[1:2]) is None


def test_modes_agree() -> None:
    prompt = [(5 * i) % 120 for i in range(23)]
    pages = list(range(6))
    fast = step_alone(make_engine(), prompt, 0, pages)
    exact = step_alone(make_engine(deterministic=True), prompt, 0, pages)
    torch.testing.assert_close(by_token(fast), by_token(exact), rtol=0, atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_chunks_and_scattered_pages_give_the_whole_prompts_logits(deterministic: bool) -> None:
    prompt = [(7 * i) % 120 for i in range(22)]
    whole = step_alone(make_engine(deterministic=deterministic), prompt, 0, list(range(6)))
    engine, pages = make_engine(deterministic=deterministic), [9, 3, 60, 1, 22, 8]
    engine.step([Slice(prompt[:8], 0, pages, ())])
    engine.step([Slice(prompt[8:20], 8, pages, ())])
    chunked = step_alone(engine, prompt[20:], 20, pages)
    atol = 0 if deterministic else 1e-4
    torch.testing.assert_close(by_token(whole), by_token(chunked), rtol=0, atol=atol)


def test_exported_pages_go_on_in_another_engine() -> None:
    prompt = [(3 * i) % 120 for i in range(9)]
    source, target = make_engine(deterministic=True), make_engine(deterministic=True)
    source.step([Slice(prompt[:8], 0, [5, 6], ())])
    for from_page, to_page in ((5, 40), (6, 2)):
        content = bytearray(source.spec.block_bytes)
        split = 2 * source.spec.layer_bytes
        source.export_page(from_page, 0, 2, memoryview(content)[:split])
        source.export_page(from_page, 2, 3, memoryview(content)[split:])
        target.insert_page(to_page, memoryview(content))
    here = step_alone(source, prompt[8:], 8, [5, 6, 7])
    there = step_alone(target, prompt[8:], 8, [40, 2, 0])
    assert here == there


def test_layers_are_reported_in_groups() -> None:
    engine, groups = make_engine(), []
    engine.step([Slice([1, 2, 3], 0, [0], ())], lambda first, end: groups.append((first, end)))
    assert groups == [(0, 2), (2, 3)]


Result = dict[str, list[DrawnToken]]


def run(
    requests: abc.Sequence[tuple[list[int], int]], dtype: torch.dtype, **config: int
) -> tuple[Result, EngineCore]:
    result: Result = {}
    engine = make_engine(dtype=dtype, deterministic=True, num_pages=config.pop("num_pages", 200))
    core = EngineCore(
        engine,
        CoreConfig(**config),
        lambda _, outputs: (
            [result.setdefault(o.sequence.id, []).extend(o.tokens) for o in outputs] and None
        ),
    )
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, logprobs=4)
    for index, (prompt, seed) in enumerate(requests):
        core.submit(Sequence(str(index), prompt, params, seed))
    while core.step():
        pass
    return result, core


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    step_tokens=st.integers(12, 80),
    max_batch=st.integers(2, 8),
)
def test_deterministic_mode_is_bit_identical(
    dtype: torch.dtype, lengths: list[int], step_tokens: int, max_batch: int
) -> None:
    """Tokens and log-probabilities, whatever the batch, the chunks and the preemptions."""
    requests = [([(i * j + i) % 120 for j in range(n)], i) for i, n in enumerate(lengths)]
    alone, _ = run(requests, dtype, max_batch=1, max_step_tokens=512)
    mixed, _ = run(requests, dtype, max_batch=max_batch, max_step_tokens=step_tokens)
    tight, core = run(requests * 2, dtype, max_batch=8, max_step_tokens=64, num_pages=16)
    assert mixed == alone
    assert {k: v for k, v in tight.items() if int(k) < len(requests)} == alone
    assert core.stats().free_pages == 16
