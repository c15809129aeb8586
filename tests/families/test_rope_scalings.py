"""Every scaling of rotary embeddings. Prompt and answer are 109 tokens.

transformers chooses the frequencies of dynamic and LongRoPE scalings anew by the length of what
it is given; an engine fixes them by the context that it serves. So an engine is compared where
both choose the same: it serves no more than the original context, or, for LongRoPE, both are
beyond it, or, for dynamic, it serves exactly the 109 tokens that transformers is given at once.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, Phi3Config

from . import parity
from .checks import test_parity  # noqa: F401
from .parity import GREEDY_TOKENS, PROMPT_TOKENS, Case

TOTAL_TOKENS = PROMPT_TOKENS + GREEDY_TOKENS
SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
SHORT_FACTORS = [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0]
LONG_FACTORS = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]


def llama(positions: int, rope_type: str, **rope: object) -> LlamaConfig:
    """A small Llama with a scaling."""
    return LlamaConfig(
        **SMALL,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **rope},
    )


def yarn(**rope: object) -> LlamaConfig:
    """One of four times 32 tokens."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32} | rope
    return llama(128, "yarn", **scaling)


def longrope(original: int, **rope: object) -> LlamaConfig:
    """One of 256 tokens."""
    return llama(
        256,
        "longrope",
        short_factor=SHORT_FACTORS,
        long_factor=LONG_FACTORS,
        original_max_position_embeddings=original,
        **rope,
    )


def phi3(original: int) -> Phi3Config:
    """The same as Phi-3 says it."""
    return Phi3Config(
        **SMALL,
        max_position_embeddings=256,
        original_max_position_embeddings=original,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": SHORT_FACTORS,
            "long_factor": LONG_FACTORS,
        },
    )


CASES = [
    Case("linear", llama(128, "linear", factor=4.0)),
    Case("linear-beyond", llama(64, "linear", factor=2.0)),
    Case("dynamic-within", llama(128, "dynamic", factor=4.0), context=128),
    Case("dynamic-beyond", llama(64, "dynamic", factor=4.0), context=TOTAL_TOKENS),
    Case("dynamic-far-beyond", llama(16, "dynamic", factor=8.0), context=TOTAL_TOKENS),
    Case("yarn", yarn()),
    Case("yarn-mscale", yarn(mscale=0.707, mscale_all_dim=1.3)),
    Case("yarn-attention-factor", yarn(attention_factor=0.8)),
    Case("yarn-not-truncated", yarn(truncate=False, beta_fast=8.0, beta_slow=0.5)),
    Case("yarn-beyond", llama(32, "yarn", factor=4.0, original_max_position_embeddings=32)),
    Case(
        "llama3",
        llama(
            128,
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    Case("longrope-short", longrope(128), context=128),
    Case("longrope-long", longrope(64), context=128),
    Case("longrope-whole-context", longrope(64)),
    Case("longrope-factor", longrope(64, factor=9.0)),
    Case("longrope-attention-factor", longrope(64, attention_factor=1.3)),
    Case("phi3-short", phi3(128), context=128),
    Case("phi3-long", phi3(64)),
]


def test_engines_of_other_frequencies_never_share_keys(tmp_path: Path) -> None:
    """Their fingerprints differ where a scaling makes the served context matter, else not."""
    for name, config, differ in (
        ("longrope", longrope(64), True),
        ("dynamic", llama(64, "dynamic", factor=4.0), True),
        ("yarn", yarn(), False),
    ):
        path = parity.save(parity.random_model(config, seed=1), tmp_path / name)
        short, long = (parity.open_engine(path, context=context) for context in (64, 128))
        assert (short.spec.fingerprint != long.spec.fingerprint) == differ
