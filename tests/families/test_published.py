"""Published checkpoints' config.json, in the form of their day, and what is refused in it."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from splitserve.errors import CheckpointError
from splitserve.models.rope import DynamicRope, LinearRope, LongRope, YarnRope

from .config_json import read, rewritten
from .published_modern import (
    COMMAND_R7B,
    GEMMA2_2B,
    GEMMA3_1B,
    GEMMA3_4B,
    GEMMA_2B,
    LLAMA_31_8B,
    LLAMA_DYNAMIC,
    PHI3_MINI_4K,
    PHI3_MINI_128K,
    PHI4_MINI,
    PUBLISHED,
    QWEN3_06B,
    QWEN25_7B_YARN,
    VICUNA_7B_16K,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_old_form_equals_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    """transformers reads the old form and writes the new one, which parity is proved for."""
    old = read(tmp_path, PUBLISHED[name])
    new = rewritten(deepcopy(PUBLISHED[name]))
    assert "rope_parameters" in new.get("text_config", new)
    assert read(tmp_path, new) == old


def test_gemma2_alternates(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA2_2B)
    assert [layer.window for layer in config.layers[:4]] == [4096, None, 4096, None]
    assert (config.attention.soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert config.attention.scale == 1 / 16
    assert config.embedding_scale == 48.0


def test_gemma2_caps_default_but_null_is_none(tmp_path: Path) -> None:
    fields = {k: v for k, v in GEMMA2_2B.items() if not k.endswith("softcapping")}
    config = read(tmp_path, fields | {"attn_logit_softcapping": None})
    assert (config.attention.soft_cap, config.logit_soft_cap) == (None, 30.0)


def test_gemma_says_gelu_and_means_its_approximation(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA_2B)
    assert config.mlp is not None
    assert config.mlp.activation == "gelu_tanh"
    assert config.tie_word_embeddings


def test_gemma3_defaults_and_ropes(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA3_4B)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (8, 4)
    assert config.max_context_tokens == 131072
    sliding, everywhere = config.layers[0], config.layers[5]
    assert sliding.rope
    assert everywhere.rope
    assert (sliding.window, sliding.rope.theta, sliding.rope.scaling) == (1024, 1e4, None)
    assert (everywhere.window, everywhere.rope.theta) == (None, 1e6)
    assert everywhere.rope.scaling == LinearRope(8.0)
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == [
        5,
        11,
        17,
        23,
        29,
    ]


def test_command_r7b_has_positions_only_where_it_slides(tmp_path: Path) -> None:
    layers = read(tmp_path, COMMAND_R7B).layers
    assert [layer.window for layer in layers[:4]] == [4096, 4096, 4096, None]
    assert [layer.rope is None for layer in layers[:4]] == [False, False, False, True]


def test_phi3_ropes(tmp_path: Path) -> None:
    rope = read(tmp_path, PHI3_MINI_128K).layers[0].rope
    assert rope
    assert isinstance(rope.scaling, LongRope)
    assert (rope.dims, rope.scaling.original_context) == (96, 4096)
    assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)
    partial = read(tmp_path, PHI4_MINI).layers[0].rope
    assert partial
    assert (partial.dims, partial.theta) == (96, 10000.0)
    assert [layer.window for layer in read(tmp_path, PHI3_MINI_4K).layers] == [2047] * 32


def test_longrope_was_first_called_su(tmp_path: Path) -> None:
    scaling = PHI3_MINI_128K["rope_scaling"] | {"type": "su"}
    first = read(tmp_path, PHI3_MINI_128K | {"rope_scaling": scaling})
    assert first == read(tmp_path, PHI3_MINI_128K)


@pytest.mark.parametrize(
    ("config", "scaling", "context"),
    [
        (VICUNA_7B_16K, LinearRope(4.0), 16384),
        (LLAMA_DYNAMIC, DynamicRope(2.0, 4096), 8192),
        (LLAMA_31_8B, None, 131072),
        (QWEN25_7B_YARN, YarnRope(4.0, 32768, 1.1386294361119891), 131072),
    ],
)
def test_scalings_stretch_the_context(
    config: dict[str, Any], scaling: object, context: int, tmp_path: Path
) -> None:
    found = read(tmp_path, config)
    assert found.layers[0].rope
    assert scaling in (None, found.layers[0].rope.scaling)
    assert found.max_context_tokens == context


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GEMMA2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
        (GEMMA2_2B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0, must be a pos"),
        (GEMMA2_2B, {"hidden_activation": "mish"}, "hidden_activation 'mish' is not supported"),
        (GEMMA2_2B, {"attn_logit_softcapping": -1}, "soft_cap is -1.0, must be a positive"),
        (GEMMA2_2B, {"layer_types": ["full_attention"]}, "layer_types names 1 layers of 26"),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, must be at least"),
        (COMMAND_R7B, {"sliding_window_pattern": -1}, "sliding_window_pattern is -1, must be at"),
        (
            PHI3_MINI_128K,
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "unless it is longrope",
        ),
        (
            PHI3_MINI_128K,
            {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | {"long_factor": [1.0]}},
            "long_factor has 1 factors, 96 rotary dimensions need 48",
        ),
        (PHI4_MINI, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, must be above"),
        (QWEN3_06B, {"rope_scaling": {"type": "ntk", "factor": 2}}, "'ntk' is not supported"),
        (
            QWEN3_06B,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention is a rope of its own",
        ),
        (LLAMA_DYNAMIC, {"max_position_embeddings": 10**400}, "max_position_embeddings is 1000"),
        (VICUNA_7B_16K, {"rope_scaling": {"type": "linear", "factor": 1e17}}, "max_context_tokens"),
        (QWEN3_06B, {"head_dim": 10**400}, "head_dim is 1000"),
        (PHI4_MINI, {"max_position_embeddings": 10**400}, "max_position_embeddings is 1000"),
        (
            QWEN25_7B_YARN,
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": math.exp(10),
                    "mscale": 1.0,
                    "mscale_all_dim": -1.0,
                }
            },
            "rope_scaling.mscale_all_dim is -1.0, must be a positive",
        ),
        (QWEN3_06B, {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to run"),
    ],
)
def test_refusals(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, config | changes)
    assert message in error.value.message
    assert str(tmp_path / "config.json") in error.value.message
