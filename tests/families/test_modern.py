"""The families that came after Llama 2. Windows are shorter than the prompt of 61 tokens."""

from __future__ import annotations

from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from .checks import test_parity  # noqa: F401
from .parity import Case

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
# No multiple of the number of heads makes this hidden size.
WIDE = GROUPED | {"head_dim": 24}

PHI4_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
}
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0},
}
GEMMA3 = WIDE | {"sliding_window": 11, "query_pre_attn_scalar": 20}

CASES = [
    Case("qwen3", Qwen3Config(**WIDE)),
    Case(
        "qwen3-window",
        Qwen3Config(
            **GROUPED,
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
    Case("gemma-mqa", GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=24)),
    Case("gemma-gelu", GemmaConfig(**GROUPED, head_dim=8, hidden_act="gelu")),
    Case("gemma2", Gemma2Config(**WIDE, sliding_window=13, query_pre_attn_scalar=20)),
    Case(
        "gemma2-hard-caps",
        Gemma2Config(
            **WIDE,
            sliding_window=9,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
    ),
    Case(
        "gemma2-no-caps",
        Gemma2Config(
            **WIDE,
            sliding_window=9,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
    ),
    Case("gemma3", Gemma3TextConfig(**GEMMA3 | {"num_hidden_layers": 7})),
    Case(
        "gemma3-scaled",
        Gemma3TextConfig(
            **GEMMA3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=GEMMA3_ROPES,
            final_logit_softcapping=5.0,
        ),
    ),
    Case(
        "gemma3-images",
        Gemma3Config(
            text_config=Gemma3TextConfig(
                **GEMMA3, layer_types=["sliding_attention", "full_attention", "full_attention"]
            ),
            vision_config=SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
        ),
    ),
    Case("phi3-mha-window", Phi3Config(**SMALL, sliding_window=13)),
    Case(
        "phi3-long-partial",
        Phi3Config(
            **GROUPED | {"hidden_size": 64},
            original_max_position_embeddings=32,
            tie_word_embeddings=True,
            rope_parameters=PHI4_ROPE,
        ),
    ),
    Case("olmo2-mha", Olmo2Config(**SMALL)),
    Case("olmo2-gqa-biases", Olmo2Config(**GROUPED, attention_bias=True, rms_norm_eps=1e-3)),
    Case("cohere", CohereConfig(**GROUPED, logit_scale=0.25)),
    Case("cohere-qk-norm", CohereConfig(**GROUPED, use_qk_norm=True, logit_scale=0.8)),
    Case(
        "cohere-untied-biases",
        CohereConfig(
            **SMALL,
            logit_scale=0.5,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_norm_eps=1e-3,
        ),
    ),
    Case(
        "cohere2",
        Cohere2Config(**GROUPED | {"num_hidden_layers": 5}, sliding_window=11, logit_scale=0.25),
    ),
    Case(
        "cohere2-types",
        Cohere2Config(
            **GROUPED,
            sliding_window=7,
            logit_scale=1.0,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        ),
    ),
    Case("glm", GlmConfig(**WIDE, eos_token_id=2)),
    Case("glm4", Glm4Config(**WIDE, eos_token_id=2)),
    Case(
        "glm4-no-biases",
        Glm4Config(
            **GROUPED,
            head_dim=16,
            eos_token_id=2,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        ),
    ),
]
