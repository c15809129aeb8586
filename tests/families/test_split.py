"""Every family through the four services and through the monolith: the same greedy tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from splitserve import LLM, SamplingParams

from . import parity, split
from .cases import all_cases
from .parity import Case

CASES = all_cases()


async def test_split_equals_monolith(case: Case, tmp_path: Path) -> None:
    """48 tokens after a prompt of three chunks, which travels from worker to worker."""
    model = parity.random_model(case.config, seed=len(case.name))
    path = parity.save(model, tmp_path / "model")
    engine = parity.open_engine(path, context=case.context)
    spec = engine.spec
    prompt = parity.prompt_of(spec.vocab_size, seed=3)
    params = replace(
        parity.GREEDY,
        max_tokens=min(parity.GREEDY_TOKENS, spec.max_context_tokens - len(prompt)),
    )
    tokens = parity.greedy(engine, engine, prompt)[: params.max_tokens]

    assert await asyncio.to_thread(_monolith, path, case.context, prompt, params) == tokens
    async with split.serving(
        path, context=case.context, block_tokens=parity.BLOCK_TOKENS, step_tokens=parity.CHUNK
    ) as suite:
        assert await suite.generate(prompt, params) == tokens
        # The decode worker has computed none of the prompt: all its pages came from the store.
        pages = -(-len(prompt) // parity.BLOCK_TOKENS)
        assert suite.written_bytes >= pages * spec.block_bytes
        assert suite.read_bytes >= pages * spec.block_bytes


def _monolith(path: Path, context: int, prompt: Sequence[int], params: SamplingParams) -> list[int]:
    with LLM(
        model=str(path),
        dtype="float32",
        threads=1,
        pool_bytes=split.POOL_BYTES,
        block_tokens=parity.BLOCK_TOKENS,
        max_context_tokens=context,
        max_batch=split.MAX_BATCH,
        max_step_tokens=parity.CHUNK,
        skip_tokenizer_init=True,
    ) as llm:
        [output] = llm.generate([list(prompt)], params)
        return list(output.outputs[0].token_ids)
