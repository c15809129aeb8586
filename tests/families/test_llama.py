from transformers import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
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
}

CASES = [
    Case("llama-mha", LlamaConfig(**SMALL)),
    Case(
        "llama-gqa-biases-llama3-rope",
        LlamaConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    Case("mistral-full", MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None)),
    Case("mistral-window", MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=13)),
    Case("qwen2", Qwen2Config(**SMALL, num_key_value_heads=2)),
    Case(
        "qwen2-window",
        Qwen2Config(
            **SMALL,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
]
