"""Compares a family with transformers on tiny random checkpoints.

A case is a transformers config. Its model gets random weights that make logits differ, is
saved as transformers saves it, and is opened by the engine from the files alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from splitserve.engine.factory import EngineConfig
from splitserve.engine.protocol import Draw, DrawnToken, Engine, Slice
from splitserve.engine.torch_engine import TorchEngine
from splitserve.engine.torch_factory import open_torch_engine
from splitserve.sampling import SamplingParams

BLOCK_TOKENS = 4
CHUNK = 24
PROMPT_TOKENS = 61
GREEDY_TOKENS = 48
MAX_LOGIT_ERROR = 1e-4
DEVICE = os.environ.get("SPLITSERVE_TEST_DEVICE", "cpu")
"""On a GPU the same tests compare its arithmetic with transformers' on the CPU."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """One configuration of one family. `context` is what the engine serves, 0 for the model's."""

    name: str
    config: PretrainedConfig
    context: int = 0


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A transformers model in fp32 whose weights are large enough for logits to differ."""
    torch.manual_seed(seed)
    config.attn_implementation = "eager"
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                near_one = "norm" in name.lower() and not name.endswith("bias")
                parameter.copy_(noise * 0.2 + (1.0 if near_one and parameter.mean() > 0.5 else 0.0))
            else:
                parameter.copy_(noise * min(parameter.shape[-2:]) ** -0.5)
    return model


def save(model: PreTrainedModel, directory: Path) -> Path:
    """The checkpoint as a user has it."""
    model.save_pretrained(directory)
    return directory


def engine_config(path: Path, context: int = 0) -> EngineConfig:
    """Of an engine in fp32 on one thread."""
    return EngineConfig(
        model=str(path),
        device=DEVICE,
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        pool_bytes=1 << 22,
        max_context_tokens=context,
        threads=1,
    )


def open_engine(path: Path, *, context: int = 0) -> TorchEngine:
    """The engine on one rank."""
    return open_torch_engine(engine_config(path, context), show_progress=False)


def prompt_of(vocab_size: int, seed: int) -> list[int]:
    """Random token ids, more than a chunk and, in the cases that have one, than a window."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' logits after every token: (tokens, vocab_size)."""
    return model(torch.tensor([list(tokens)])).logits[0].float()


def greedy_from(logits: torch.Tensor, prompt_tokens: int) -> list[int]:
    """What is likeliest after the prompt and after every token that follows it but the last."""
    return logits[prompt_tokens - 1 : -1].argmax(dim=-1).tolist()


def chunked_logits(engine: TorchEngine, tokens: Sequence[int]) -> torch.Tensor:
    """The engine's logits after every token, computed chunk by chunk in scattered pages."""
    pages = _pages(engine, engine, len(tokens))
    return torch.cat(
        [
            engine.score(Slice(tokens[start : start + CHUNK], start, pages, ())).cpu()
            for start in range(0, len(tokens), CHUNK)
        ]
    )


def greedy(prefill: Engine, decode: Engine, prompt: Sequence[int]) -> list[int]:
    """48 tokens: the prompt in chunks on one engine, its pages moved, the rest on the other."""
    return [token.token_id for token in drawn(prefill, decode, prompt, GREEDY)]


def drawn(
    prefill: Engine,
    decode: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    count: int = GREEDY_TOKENS,
) -> list[DrawnToken]:
    """As `greedy`, with what else `params` asks for."""
    pages = _pages(prefill, decode, len(prompt) + count)
    output: list[DrawnToken] = []

    def run(engine: Engine, tokens: Sequence[int], start: int, *, last: bool) -> None:
        so_far = tuple(token.token_id for token in output)
        draws = (Draw(params, 0, 0, prompt, so_far),) if last else ()
        output.extend(engine.step([Slice(tokens, start, pages, draws)])[0])

    for start in range(0, len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        run(prefill, prompt[start:end], start, last=end == len(prompt))
    if decode is not prefill:
        _move(prefill, decode, pages)
    while len(output) < count:
        run(decode, [output[-1].token_id], len(prompt) + len(output) - 1, last=True)
    return output


def _pages(engine: Engine, other: Engine, tokens: int) -> list[int]:
    """Pages in no order, so that whoever reads them as contiguous is wrong."""
    count = -(-tokens // BLOCK_TOKENS)
    num_pages = min(engine.spec.num_pages, other.spec.num_pages)
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(num_pages, generator=generator)[:count].tolist()


def _move(source: Engine, target: Engine, pages: Sequence[int]) -> None:
    spec = source.spec
    for page in pages:
        content = memoryview(bytearray(spec.block_bytes))
        source.export_page(page, 0, spec.num_layers, content)
        target.insert_page(page, content)
