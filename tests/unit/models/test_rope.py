from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from splitserve.errors import CheckpointError
from splitserve.fields import Fields
from splitserve.models.families.reading import read_rope
from splitserve.models.rope import (
    DynamicRope,
    FactorsRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeConfig,
    RopeScaling,
    YarnRope,
)

THETA = 500000.0
DIMS = 128
SHORT = tuple(1 + i / 100 for i in range(64))
LONG = tuple(1 + i / 4 for i in range(64))


def rope(scaling: RopeScaling | None) -> RopeConfig:
    return RopeConfig(THETA, DIMS, scaling)


def llama(positions=131072, **parameters) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        max_position_embeddings=positions,
        rope_parameters=parameters | {"rope_theta": THETA},
    )


def theirs(config, length=None):
    if config.rope_parameters["rope_type"] == "default":
        oracle = LlamaRotaryEmbedding(config)
        return oracle.inv_freq.numpy(), 1.0
    function = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    inverse, factor = function(config, torch.device("cpu"), seq_len=length)
    return inverse.numpy(), factor


def read(tmp_path, config) -> RopeConfig:
    return read_rope(Fields(tmp_path / "config.json", config.to_dict()), DIMS)


@pytest.mark.parametrize(
    ("scaling", "parameters"),
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
        (
            YarnRope(4.0, 32768, 1.1386294361119891),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        ),
        (
            YarnRope(40.0, 4096, 1.0, beta_fast=24.0, beta_slow=2.0, truncate=False),
            {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 24,
                "beta_slow": 2,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "truncate": False,
            },
        ),
        # An original context so short that no pair turns often enough: the ramp is upside down.
        (
            YarnRope(2.0, 4, 1.0693147180559945),
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
        ),
    ],
)
def test_equals_transformers_at_any_context(scaling, parameters, tmp_path):
    config = llama(**parameters)
    assert read(tmp_path, config) == rope(scaling)
    inverse, factor = theirs(config)
    for context in (1, 1 << 20):
        ours = rope(scaling).inverse_frequencies(context)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, inverse, rtol=4e-7)
    assert rope(scaling).attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("context", [1, 4095, 4096, 4097, 6000, 16384])
def test_dynamic_equals_transformers_at_that_length(context, tmp_path):
    config = llama(4096, rope_type="dynamic", factor=4.0)
    assert read(tmp_path, config) == rope(DynamicRope(4.0, 4096))
    ours = rope(DynamicRope(4.0, 4096)).inverse_frequencies(context)
    np.testing.assert_allclose(ours, theirs(config, context)[0], rtol=1e-6)


def test_dynamic_leaves_the_original_context_alone():
    scaled = rope(DynamicRope(4.0, 4096))
    plain = rope(None).inverse_frequencies(0)
    np.testing.assert_array_equal(scaled.inverse_frequencies(4096), plain)
    assert (scaled.inverse_frequencies(4097)[1:] < plain[1:]).all()


@pytest.mark.parametrize("context", [1, 4096, 4097, 131072])
def test_longrope_equals_transformers_at_that_length(context, tmp_path):
    config = llama(
        rope_type="longrope",
        short_factor=list(SHORT),
        long_factor=list(LONG),
        original_max_position_embeddings=4096,
    )
    inverse, factor = theirs(config, context)
    scaled = read(tmp_path, config)
    assert scaled == rope(LongRope(SHORT, LONG, 4096, factor))
    np.testing.assert_allclose(scaled.inverse_frequencies(context), inverse, rtol=4e-7)


def test_factors_divide():
    plain = rope(None).inverse_frequencies(1)
    factors = tuple(float(1 + i % 8) for i in range(64))
    scaled = rope(FactorsRope(factors)).inverse_frequencies(1)
    np.testing.assert_allclose(scaled, plain / np.array(factors, np.float32), rtol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rope(FactorsRope((1.0,) * 3)), "rope_freqs has 3 factors, 128 rotary dim"),
        (lambda: rope(LongRope(SHORT, LONG[1:], 4096, 1.0)), "long_factor has 63 factors"),
        (lambda: LongRope((0.0,), (1.0,), 4096, 1.0), "short_factor or long_factor is 0.0"),
        (lambda: RopeConfig(THETA, 7), "rotary embedding of 7 dimensions; it needs pairs"),
        (lambda: RopeConfig(0.5, 8), "rope_theta is 0.5, must be 1 to 1e"),
        (lambda: LinearRope(0.5), "factor is 0.5, must be 1 to 1e"),
        (lambda: DynamicRope(2.0, 0), "original_max_position_embeddings is 0, must be 1 to"),
        (lambda: YarnRope(2.0, 32, float("nan")), "attention_factor is nan, must be a positive"),
        (lambda: Llama3Rope(8.0, 4.0, 4.0, 32), "high_freq_factor must be above low_freq_factor"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(CheckpointError, match=message):
        make()
