"""Every family over two ranks in two processes: the tokens of one rank, and each weight once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitserve.engine.factory import open_engine
from splitserve.engine.protocol import Draw, DrawnToken, Slice
from splitserve.errors import CheckpointError
from splitserve.weights.checkpoint import open_checkpoint

from . import parity
from .cases import all_cases
from .parity import Case
from .ranks import TwoRanks, check_shares

CASES = all_cases()
PARAMS = replace(parity.GREEDY, logprobs=1)
MAX_LOGPROB_ERROR = 1e-4
DECODED_TOKENS = 24


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.close()


def test_two_ranks(case: Case, two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Tokens and their log-probabilities where the KV is handed over from two ranks to one, and
    from one to two.
    """
    path = parity.save(parity.random_model(case.config, seed=len(case.name)), tmp_path / "model")
    check_shares(open_checkpoint(path).config)
    alone = parity.open_engine(path, context=case.context)
    prompt = parity.prompt_of(alone.spec.vocab_size, seed=3)
    expected = parity.drawn(alone, alone, prompt, PARAMS)
    with two_ranks.open(parity.engine_config(path, case.context)) as both:
        assert both.spec.fingerprint == alone.spec.fingerprint
        _check_same(parity.drawn(both, alone, prompt, PARAMS), expected)
        # Fewer of them: a step of two processes takes longer than one of a tiny model.
        tokens = parity.drawn(alone, both, prompt, PARAMS, DECODED_TOKENS)
        _check_same(tokens, expected[:DECODED_TOKENS])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kv_dtype": "int8"}, MAX_LOGPROB_ERROR),
        ({"kv_dtype": "fp8"}, MAX_LOGPROB_ERROR),
        # Each rank rounds its own columns of a matrix that is cut by columns, by their own scales.
        ({"quantization": "int8"}, 0.05),
        ({"quantization": "fp8"}, 0.3),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_rounded_on_two_ranks(
    settings: dict[str, Any], error: float, two_ranks: TwoRanks, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == "qwen2")
    path = parity.save(parity.random_model(case.config, seed=3), tmp_path / "model")
    config = replace(parity.engine_config(path), **settings)
    alone = open_engine(config)
    prompt = parity.prompt_of(alone.spec.vocab_size, seed=3)
    count = 12 if "kv_dtype" in settings else 1
    expected = parity.drawn(alone, alone, prompt, PARAMS, count)
    with two_ranks.open(config) as both:
        # Weights that a rank rounded by its own part are not those of another number of ranks.
        same_weights = "quantization" not in settings
        assert (both.spec.fingerprint == alone.spec.fingerprint) == same_weights
        _check_same(parity.drawn(both, alone, prompt, PARAMS, count), expected, error)
        _check_same(parity.drawn(alone, both, prompt, PARAMS, count), expected, error)
        _check_same(parity.drawn(both, both, prompt, PARAMS, count), expected, error)


def test_deterministic_on_two_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """The same bits in any batch; but not those of one rank, which does not get the KV."""
    case = CASES[0]
    path = parity.save(parity.random_model(case.config, seed=3), tmp_path / "model")
    config = replace(parity.engine_config(path, case.context), deterministic=True)
    prompt, other = (parity.prompt_of(case.config.vocab_size, seed=seed) for seed in (3, 4))
    draws = (Draw(PARAMS, 0, 0, prompt, ()),)
    with two_ranks.open(config) as both:
        assert both.spec.fingerprint != open_engine(config).spec.fingerprint
        [alone] = both.step([Slice(prompt, 0, range(16), draws)])
        both.step([Slice(prompt[:40], 0, range(16), ())])
        neighbour = Slice(other, 0, range(16, 32), ())
        _, beside = both.step([neighbour, Slice(prompt[40:], 40, range(16), draws)])
        assert beside == alone


def test_what_rank_1_cannot_open_is_raised_here(two_ranks: TwoRanks, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen2")
    path = parity.save(parity.random_model(case.config, seed=3), tmp_path / "model")
    config = replace(parity.engine_config(path), quantization="int4")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="groups of 32 do not divide"), two_ranks.open(config):
        pytest.fail("opened")
    assert time.monotonic() - began < 5


def _check_same(
    found: list[DrawnToken], expected: list[DrawnToken], error: float = MAX_LOGPROB_ERROR
) -> None:
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    for mine, other in zip(found, expected, strict=True):
        assert abs(mine.logprob - other.logprob) < error
