"""Draws on a GPU: several programs a row, in a graph, against plain torch.

Kernels are imported in the tests: those in tests/kernels must be the first to import triton.
"""

import itertools

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB = 128256
RULES = list(itertools.product((0.0, 0.3, 1.0, 2.0), (0, 1, 41, 9001), (1.0, 0.9), (0.0, 0.05)))


def parameters() -> list[Tensor]:
    """Of a row for each of the rules, and fresh uniforms."""
    columns = [torch.tensor(column, device="cuda") for column in zip(*RULES, strict=True)]
    uniforms = torch.rand(len(RULES), dtype=torch.float64, device="cuda")
    return [columns[0], columns[1].int(), columns[2].double(), columns[3], uniforms]


def logits_of(kind: str) -> Tensor:
    shape = (len(RULES), VOCAB)
    if kind == "ties":
        return torch.randint(-1, 3, shape, device="cuda").float()
    logits = torch.randn(shape, device="cuda") * {"flat": 0.1, "normal": 1.0, "peaked": 5.0}[kind]
    logits[:, ::5] = -torch.inf
    return logits


def outside(logits: Tensor, rules: list[Tensor], tokens: Tensor) -> float:
    """How far uniforms are from their tokens' shares of the cumulative distribution, at most."""
    from splitserve_kernels.sampling import truncated_reference

    worst = 0.0
    for i, token in enumerate(tokens.tolist()):
        temperature, *how = (float(column[i]) for column in rules[:4])
        if temperature == 0:
            assert token == int(logits[i].argmax())
            continue
        shares = truncated_reference(logits[i], temperature, *how)
        ends, uniform = shares.cumsum(-1) / shares.sum(), float(rules[4][i])
        below = float(ends[token - 1]) if token else 0.0
        worst = max(worst, below - uniform, uniform - float(ends[token]))
    return worst


@pytest.mark.parametrize("kind", ["flat", "normal", "peaked", "ties"])
def test_every_rule_in_one_batch(kind: str) -> None:
    """Off by what rounding moves a boundary, or by one of many equal tokens. No top-p of a top-k is
    a whole number of them: where equal tokens end there, rounding decides.
    """
    from splitserve_kernels.sampling import sample

    torch.manual_seed(7)
    logits, rules = logits_of(kind), parameters()
    tokens = sample(logits, *rules)
    assert outside(logits, rules, tokens) < 5e-5
    for _ in range(5):
        assert torch.equal(sample(logits, *rules), tokens)
    for i in range(0, len(RULES), 9):
        alone = sample(logits[i : i + 1], *(column[i : i + 1].clone() for column in rules))
        assert int(alone) == int(tokens[i])


@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_without_the_launches_that_no_row_needs(min_p: float) -> None:
    from splitserve_kernels.sampling import sample

    torch.manual_seed(9)
    logits, rules = logits_of("normal"), parameters()
    for column, value in zip(rules[1:4], (0, 1.0, min_p), strict=True):
        column.fill_(value)
    tokens = sample(logits, *rules, any_top_k_or_p=False, any_min_p=min_p > 0)
    assert torch.equal(tokens, sample(logits, *rules))


def test_a_graph_draws_by_other_rules() -> None:
    from splitserve_kernels.sampling import sample

    torch.manual_seed(8)
    logits, rules = logits_of("normal"), parameters()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sample(logits, *rules)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            tokens = sample(logits, *rules)
        for kind in ("peaked", "flat", "ties"):
            order = torch.randperm(len(RULES), device="cuda")
            logits.copy_(logits_of(kind))
            for column in rules:
                column.copy_(column[order])
            graph.replay()
            assert torch.equal(tokens, sample(logits, *rules))
            assert outside(logits, rules, tokens) < 5e-5
