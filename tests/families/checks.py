"""What every family must pass. A module of tests names its cases and imports `test_parity`."""

from __future__ import annotations

from pathlib import Path

import torch

from . import parity
from .parity import Case


def test_parity(case: Case, tmp_path: Path) -> None:
    """Logits after every token in fp32, and 48 greedy tokens in one engine and over two."""
    model = parity.random_model(case.config, seed=len(case.name))
    path = parity.save(model, tmp_path / "model")
    engine = parity.open_engine(path, context=case.context)
    prompt = parity.prompt_of(engine.spec.vocab_size, seed=3)

    tokens = parity.greedy(engine, engine, prompt)
    expected = parity.expected_logits(model, prompt + tokens)
    found = parity.chunked_logits(engine, prompt + tokens)

    assert found.shape == expected.shape
    assert expected.std() > 0.1, "logits must differ for the comparison to mean something"
    assert (found - expected).abs().max() < parity.MAX_LOGIT_ERROR
    # Greedy tokens of transformers, given all before them: the same sequence, by induction.
    assert tokens == parity.greedy_from(expected, len(prompt))
    other = parity.open_engine(path, context=case.context)
    assert other.spec.fingerprint == engine.spec.fingerprint
    assert parity.greedy(engine, other, prompt) == tokens
    assert not torch.isnan(found).any()
