from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from splitserve.errors import CheckpointError
from splitserve.models.config import FactorsRope, LinearRope, Llama3Rope, ModelConfig, RopeScaling
from splitserve.models.rope import inverse_frequencies


def config_with(scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=512,
        intermediate_size=512,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=100,
        max_context_tokens=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        (None, {"rope_type": "default"}),
        (LinearRope(4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            Llama3Rope(8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_equals_transformers(scaling, theirs):
    oracle = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=512,
            num_attention_heads=4,
            max_position_embeddings=131072,
            rope_parameters=theirs | {"rope_theta": 500000.0},
        )
    )
    ours = inverse_frequencies(config_with(scaling))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, oracle.inv_freq.numpy(), rtol=3e-7)


def test_factors_divide():
    plain = inverse_frequencies(config_with(None))
    factors = tuple(float(1 + i % 8) for i in range(64))
    scaled = inverse_frequencies(config_with(FactorsRope(factors)))
    np.testing.assert_allclose(scaled, plain / np.array(factors, np.float32), rtol=1e-7)


def test_factors_must_fit_the_head():
    with pytest.raises(CheckpointError, match="rope_freqs has 3 factors, head_dim 128 needs 64"):
        config_with(FactorsRope((1.0, 1.0, 1.0)))
