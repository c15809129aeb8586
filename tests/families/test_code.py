from pathlib import Path

import pytest
from transformers import (
    GPTBigCodeConfig,
    PretrainedConfig,
    StableLmConfig,
    Starcoder2Config,
)

from splitserve.errors import CheckpointError

from .checks import test_parity  # noqa: F401
from .config_json import changed, read, rewritten
from .parity import Case

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SMALL_GPT = {"vocab_size": 99, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
STARCODER = GPTBigCodeConfig(**SMALL_GPT)
STARCODER2 = Starcoder2Config(**SMALL, num_key_value_heads=2)
STABLELM = StableLmConfig(**SMALL, num_key_value_heads=4)

CASES = [
    Case("starcoder", STARCODER),
    Case(
        "bigcode-all-heads",
        GPTBigCodeConfig(
            **SMALL_GPT,
            multi_query=False,
            activation_function="gelu",
            scale_attn_weights=False,
            n_inner=48,
            tie_word_embeddings=False,
        ),
    ),
    Case("starcoder2", STARCODER2),
    Case(
        "starcoder2-window",
        Starcoder2Config(
            **SMALL, num_key_value_heads=1, sliding_window=13, tie_word_embeddings=False
        ),
    ),
    Case(
        "starcoder2-no-biases",
        Starcoder2Config(
            **SMALL,
            num_key_value_heads=4,
            use_bias=False,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        ),
    ),
    Case("stablelm", STABLELM),
    Case(
        "stablelm-2-1.6b",
        StableLmConfig(**SMALL, num_key_value_heads=2, use_qkv_bias=True, tie_word_embeddings=True),
    ),
    Case(
        "stablelm-2-12b",
        StableLmConfig(
            **SMALL,
            num_key_value_heads=2,
            qk_layernorm=True,
            use_parallel_residual=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
    ),
    Case(
        "stablelm-one-normed-key",
        StableLmConfig(**SMALL, num_key_value_heads=1, qk_layernorm=True),
    ),
]

PUBLISHED = {
    "starcoderbase": {
        "activation_function": "gelu",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "inference_runner": 0,
        "layer_norm_epsilon": 1e-05,
        "max_sequence_length": None,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": 6144,
        "n_head": 48,
        "n_inner": 24576,
        "n_layer": 40,
        "n_positions": 8192,
        "pad_key_length": True,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "vocab_size": 49152,
    },
    "starcoder2-3b": {
        "architectures": ["Starcoder2ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": 24,
        "num_hidden_layers": 30,
        "num_key_value_heads": 2,
        "rope_theta": 999999.4420358813,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    },
    "stablelm-3b-4e1t": {
        "architectures": ["StableLmForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "model_type": "stablelm",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    """Read as they are, and after transformers has renamed and completed their keys."""
    found = read(tmp_path, PUBLISHED[name])
    assert found.num_layers in (30, 32, 40)
    assert read(tmp_path, rewritten(PUBLISHED[name])) == found


@pytest.mark.parametrize(
    ("config", "key", "value", "says"),
    [
        (STARCODER, "add_cross_attention", True, "is True, supported: False"),
        (STARCODER, "activation_function", "gelu_10", "'gelu_10' is not supported"),
        (STARCODER2, "norm_type", "rms_norm", "is 'rms_norm', supported: 'layer_norm'"),
        (STARCODER2, "mlp_type", "gated", "is 'gated', supported: 'default'"),
        (STABLELM, "hidden_act", "mish", "'mish' is not supported"),
        (STABLELM, "rope_scaling", {"type": "ntk"}, "'ntk' is not supported"),
    ],
)
def test_refused(
    config: PretrainedConfig, key: str, value: object, says: str, tmp_path: Path
) -> None:
    """One line that names the key and what there is."""
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, changed(config, **{key: value}))
    assert says in error.value.message
    assert key.partition("_")[0] in error.value.message
    assert "\n" not in error.value.message
