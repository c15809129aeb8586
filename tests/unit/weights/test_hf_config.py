from __future__ import annotations

import json

import pytest

from splitserve.errors import CheckpointError
from splitserve.models.config import LinearRope, Llama3Rope
from splitserve.weights import read_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_a_whole_config(tiny):
    config = read_config(tiny.directory)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (16, 24, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 4)
    assert (config.vocab_size, config.max_context_tokens) == (32, 64)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10000.0, None)
    assert not config.tie_word_embeddings
    assert {config.attention_bias, config.attention_output_bias, config.mlp_bias} == {False}
    assert (config.bos_token_id, config.eos_token_ids) == (1, frozenset({2}))


def test_generation_config_wins(tiny):
    (tiny.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert read_config(tiny.directory).eos_token_ids == {5, 7}
    assert read_config(tiny.directory).bos_token_id == 1


def test_defaults(tiny):
    tiny.write_config(num_key_value_heads=..., rope_theta=..., eos_token_id=None)
    config = read_config(tiny.directory)
    assert config.num_kv_heads == 4
    assert config.rope_theta == 10000.0
    assert config.eos_token_ids == frozenset()


def test_rope_scaling(tiny):
    tiny.write_config(rope_scaling=LLAMA3)
    assert read_config(tiny.directory).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)
    tiny.write_config(rope_scaling={"type": "linear", "factor": 2})
    assert read_config(tiny.directory).rope_scaling == LinearRope(2.0)
    # transformers 5 writes it so.
    tiny.write_config(rope_theta=..., rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    config = read_config(tiny.directory)
    assert (config.rope_theta, config.rope_scaling) == (5e5, Llama3Rope(8.0, 1.0, 4.0, 8192))


def test_qwen2_has_three_biases(tiny):
    tiny.write_config(architectures=["Qwen2ForCausalLM"])
    config = read_config(tiny.directory)
    assert config.attention_bias
    assert not config.attention_output_bias
    tiny.write_config(attention_bias=True)
    assert read_config(tiny.directory).attention_output_bias


def test_a_window_as_long_as_the_context_is_none(tiny):
    tiny.write_config(architectures=["MistralForCausalLM"], sliding_window=64)
    assert read_config(tiny.directory).architecture == "MistralForCausalLM"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPTJForCausalLM"]}, "architecture 'GPTJForCausalLM' is not supported"),
        ({"architectures": ...}, "architectures must name one"),
        ({"architectures": [1]}, "architectures must be a list of strings"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "(method 'gptq') is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"sliding_window": 8}, "sliding_window 8 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0, must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True, must be a whole number"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 0, "head_dim": 4}, "num_heads is 0"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_key_value_heads": 8}, "num_heads 4 is not a multiple of num_kv_heads 8"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"vocab_size": 1 << 30}, "vocab_size is"),
        ({"max_position_embeddings": 0}, "max_context_tokens is 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', must be a number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling.factor is 0.0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be above"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', must be an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": 32}, "token 32 is outside the vocabulary of 32"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id must be a list of whole numbers"),
        ({"bos_token_id": -1}, "token -1 is outside"),
    ],
)
def test_refused(tiny, changes, expected):
    tiny.write_config(**changes)
    with pytest.raises(CheckpointError) as caught:
        read_config(tiny.directory)
    message = caught.value.message
    assert message.startswith(f"{tiny.directory / 'config.json'}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_broken_json(tiny, content):
    (tiny.directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_config(tiny.directory)
