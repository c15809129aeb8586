"""Greedy tokens through the four services are those of transformers in fp32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from splitserve import LLM, SamplingParams
from splitserve.client import Client
from splitserve.outputs import RequestOutput
from splitserve.tokenizer import Tokenizer

from .conftest import StartSuite
from .prompts import PROMPTS

NUM_TOKENS = 64
MAX_TIE = 1e-3
"""Two tokens whose logits differ by no more may rank either way: that is rounding."""

pytestmark = [pytest.mark.model, pytest.mark.slow]
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def oracle(model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        model_path.parent,
        gguf_file=model_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()


def prompt_ids(tokenizer: Tokenizer, model_path: Path) -> list[list[int]]:
    from splitserve.chat import ChatTemplate

    template = ChatTemplate.from_checkpoint(model_path)
    assert template is not None
    return [
        tokenizer.encode(prompt)
        if isinstance(prompt, str)
        else tokenizer.encode(template.render(prompt), add_special_tokens=False)
        for prompt in PROMPTS
    ]


@torch.inference_mode()
def gap_below_best(oracle: Any, prompt: list[int], output: list[int]) -> float:
    """How far the worst of `output` is below the oracle's best token, each given all before it.

    0 means that greedy decoding by the oracle gives just these tokens.
    """
    logits = oracle(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
    chosen = logits[torch.arange(len(output)), torch.tensor(output)]
    return float((logits.max(dim=-1).values - chosen).max())


@pytest.mark.timeout(300)
def test_fifty_prompts_equal_transformers(
    start_suite: StartSuite, oracle: Any, model_path: Path
) -> None:
    with start_suite("--dtype", "float32") as client, ThreadPoolExecutor(16) as threads:
        outputs = list(threads.map(lambda p: generate(client, p), PROMPTS))
    prompts = prompt_ids(Tokenizer.from_checkpoint(model_path), model_path)
    for prompt, ids, output in zip(PROMPTS, prompts, outputs, strict=True):
        assert output.usage is not None
        assert output.usage.prompt_tokens == len(ids)
        tokens = output.outputs[0].token_ids
        assert len(tokens) == NUM_TOKENS
        assert gap_below_best(oracle, ids, tokens) <= MAX_TIE, prompt


def generate(client: Client, prompt: str | list[dict[str, str]]) -> RequestOutput:
    return client.generate(prompt, PARAMS, timeout=200)


@pytest.mark.timeout(120)
def test_the_monolith_equals_transformers(oracle: Any, model_path: Path) -> None:
    prompts = prompt_ids(Tokenizer.from_checkpoint(model_path), model_path)[::10]
    with LLM(str(model_path), dtype="float32") as llm:
        outputs = llm.generate(prompts, PARAMS)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert gap_below_best(oracle, prompt, output.outputs[0].token_ids) <= MAX_TIE
