"""G1: the same request and seed give identical tokens and bit-identical log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitserve import LLM, SamplingParams
from splitserve.client import Client
from splitserve.outputs import RequestOutput

from .conftest import StartSuite

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(240)]

NUM_REQUESTS = 20
Bits = list[tuple[list[int], list[tuple[float, tuple[tuple[int, float], ...]]]]]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Lengths from 1 to 143, several ways to sample, two choices here and there."""
    return [
        (
            [(31 * i * i + 17 * j + 5) % 40000 for j in range(1 + (i * 37) % 143)],
            SamplingParams(
                temperature=0.0 if i % 5 == 0 else 0.6 + 0.05 * i,
                top_p=0.9 if i % 2 else 1.0,
                top_k=40 if i % 3 == 0 else 0,
                min_p=0.02 if i % 4 == 0 else 0.0,
                repetition_penalty=1.1 if i % 6 == 0 else 1.0,
                seed=1000 + i,
                max_tokens=16,
                logprobs=3,
                ignore_eos=True,
                n=2 if i % 7 == 0 else 1,
            ),
        )
        for i in range(NUM_REQUESTS)
    ]


def bits(outputs: Iterable[RequestOutput]) -> Bits:
    """Everything that must be equal. Floats compare by value, and none of these is a NaN."""
    return [
        (
            choice.token_ids,
            [
                (p.chosen.logprob, tuple((t.token_id, t.logprob) for t in p.top))
                for p in choice.logprobs or ()
            ],
        )
        for output in outputs
        for choice in output.outputs
    ]


def run(llm: LLM) -> Bits:
    prompts, params = zip(*requests(), strict=True)
    return bits(llm.generate(list(prompts), list(params)))


@pytest.fixture(scope="module")
def alone(model_path: Path) -> Bits:
    """One sequence at a time, nothing reused."""
    with LLM(str(model_path), deterministic=True, max_batch=1, reuse_prefixes=False) as llm:
        return run(llm)


@pytest.mark.parametrize("chunk", [16, 512])
def test_in_a_batch_of_16(model_path: Path, alone: Bits, chunk: int) -> None:
    with LLM(str(model_path), deterministic=True, max_batch=16, max_step_tokens=16 + chunk) as llm:
        assert run(llm) == alone


def test_from_a_prefix_hit(model_path: Path, alone: Bits) -> None:
    with LLM(str(model_path), deterministic=True, max_batch=16) as llm:
        run(llm)
        prompts, params = zip(*requests(), strict=True)
        outputs = llm.generate(list(prompts), list(params))
    assert bits(outputs) == alone
    hits = [o.usage.cached_prompt_tokens for o in outputs if o.usage]
    assert sum(hits) > 1000, "the second run must really be served from the pool"


def test_after_preemption(model_path: Path, alone: Bits) -> None:
    page = 30 * 2 * 4 * 3 * 64 * 2
    with LLM(
        str(model_path), deterministic=True, max_batch=16, block_tokens=4, pool_bytes=60 * page
    ) as llm:
        assert run(llm) == alone
        assert llm.stats().num_preemptions > 0


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_split(start_suite: StartSuite, alone: Bits, transport: str) -> None:
    def ask(client: Client) -> list[RequestOutput]:
        return list(threads.map(lambda r: client.generate(*r, timeout=120), requests()))

    with (
        start_suite("--deterministic", "--transport", transport) as client,
        ThreadPoolExecutor(NUM_REQUESTS) as threads,
    ):
        assert bits(ask(client)) == alone
        if transport == "shm":
            assert bits(ask(client)) == alone, "from blocks that are cached on both tiers"
