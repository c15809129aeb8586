"""The engine with the Triton kernels against the engine with plain torch."""

import pytest
import torch

from splitserve.engine.protocol import Draw, Slice
from splitserve.engine.torch_engine import TorchEngine
from splitserve.engine.triton_attention import TritonAttention
from splitserve.sampling import SamplingParams

from ..tiny_model import make_engine

LOGPROBS = SamplingParams(temperature=0, max_tokens=8, logprobs=120)


def logprobs_of_steps(engine: TorchEngine) -> torch.Tensor:
    """Prompts of 1, 9 and 20 tokens in one step, then their next tokens with a new prompt's
    chunk, then a second chunk beside two decoding sequences. Row: a draw; column: a token.
    """
    pages = {"a": [7, 40, 3], "b": [60, 2, 11, 5], "c": [1, 22, 8, 50, 9, 4], "d": [33, 6, 20]}
    tokens = {name: [(k * i + k) % 120 for i in range(24)] for k, name in enumerate("abcd", 3)}
    steps = [
        [("a", 0, 1), ("b", 0, 9), ("c", 0, 20)],
        [("a", 1, 1), ("b", 9, 1), ("c", 20, 1), ("d", 0, 7)],
        [("d", 7, 5), ("b", 10, 1), ("c", 21, 1)],
    ]
    rows = []
    for step in steps:
        slices = [
            Slice(
                tokens[name][start : start + count],
                start,
                pages[name],
                [Draw(LOGPROBS, 0, 0, tokens[name], ())],
            )
            for name, start, count in step
        ]
        for [token] in engine.step(slices):
            row = torch.empty(120)
            for entry in token.top:
                row[entry.token_id] = entry.logprob
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("num_processors", [1, 132])
def test_engine_equals_the_one_with_plain_torch(num_processors: int) -> None:
    kernels = make_engine(make_attention=lambda memory, _: TritonAttention(memory, num_processors))
    torch.testing.assert_close(
        logprobs_of_steps(kernels), logprobs_of_steps(make_engine()), rtol=0, atol=1e-4
    )
