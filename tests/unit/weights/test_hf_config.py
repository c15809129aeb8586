from __future__ import annotations

import json

import pytest
from transformers import GptOssConfig, MistralConfig

from splitserve.errors import CheckpointError
from splitserve.models.rope import LinearRope, Llama3Rope, RopeConfig, YarnRope
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
    assert (config.hidden_size, config.mlp.size, config.num_layers) == (16, 24, 2)
    attention = config.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 4)
    assert (config.vocab_size, config.max_context_tokens) == (32, 64)
    assert (config.norm.kind, config.norm.eps) == ("rms", 1e-5)
    assert {layer.rope for layer in config.layers} == {RopeConfig(10000.0, 4)}
    assert not config.tie_word_embeddings
    assert {attention.qkv_bias, attention.out_bias, config.mlp.bias} == {False}
    assert (config.bos_token_id, config.eos_token_ids) == (1, frozenset({2}))


def test_generation_config_wins(tiny):
    (tiny.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert read_config(tiny.directory).eos_token_ids == {5, 7}
    assert read_config(tiny.directory).bos_token_id == 1


def test_defaults(tiny):
    tiny.write_config(num_key_value_heads=..., rope_theta=..., eos_token_id=None)
    config = read_config(tiny.directory)
    assert config.attention.num_kv_heads == 4
    assert config.layers[0].rope == RopeConfig(10000.0, 4)
    assert config.eos_token_ids == frozenset()


def test_rope_scaling(tiny):
    llama3 = Llama3Rope(8.0, 1.0, 4.0, 8192)
    tiny.write_config(rope_scaling=LLAMA3)
    assert read_config(tiny.directory).layers[0].rope.scaling == llama3
    tiny.write_config(rope_scaling={"type": "linear", "factor": 2})
    assert read_config(tiny.directory).layers[0].rope.scaling == LinearRope(2.0)
    # transformers 5 writes it so.
    tiny.write_config(rope_theta=..., rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert read_config(tiny.directory).layers[1].rope == RopeConfig(5e5, 4, llama3)


def test_qwen2_has_three_biases(tiny):
    for changes in ({}, {"attention_bias": True}):
        tiny.write_config(architectures=["Qwen2ForCausalLM"], **changes)
        attention = read_config(tiny.directory).attention
        assert attention.qkv_bias
        assert not attention.out_bias


def test_a_sliding_window(tiny):
    tiny.write_config(architectures=["MistralForCausalLM"], sliding_window=8)
    config = read_config(tiny.directory)
    assert config.architecture == "MistralForCausalLM"
    assert [layer.window for layer in config.layers] == [8, 8]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": ["EvilForCausalLM"]},
            "architectures 'EvilForCausalLM' is not supported",
        ),
        ({"architectures": ...}, "architectures must name one"),
        ({"architectures": [1]}, "architectures must be a list of strings"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code to run"),
        ({"hidden_act": "swoosh"}, "hidden_act 'swoosh' is not supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, must be above 0"),
        ({"hidden_size": 0, "head_dim": 4}, "hidden_size is 0"),
        ({"hidden_size": -16}, "hidden_size is -16"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776"),
        ({"hidden_size": 1 << 40, "head_dim": 4}, "hidden_size is 1099511627776"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0, must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True, must be a whole number"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 0, "head_dim": 4}, "num_heads is 0"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_key_value_heads": 8}, "num_heads 4 is not a multiple of num_kv_heads 8"),
        ({"head_dim": 5}, "rotary embedding of 5 dimensions; it needs pairs"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"vocab_size": 1 << 30}, "vocab_size is"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": 0.0}, "the norm's epsilon is 0.0"),
        ({"rms_norm_eps": float("nan")}, "the norm's epsilon is nan"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', must be a number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "rope_theta is too large"),
        ({"rope_scaling": {"rope_type": "odd", "factor": 4}}, "'odd' is not supported"),
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


def test_a_window_left_out_is_hugging_faces_and_null_is_none(tiny):
    def windows(**changes):
        tiny.write_config(num_local_experts=2, num_experts_per_tok=1, **changes)
        return [layer.window for layer in read_config(tiny.directory).layers]

    mistral, gpt_oss = ["MistralForCausalLM"], ["GptOssForCausalLM"]
    assert windows(architectures=mistral) == [MistralConfig().sliding_window] * 2
    assert windows(architectures=mistral, sliding_window=None) == [None] * 2
    assert windows(architectures=gpt_oss) == [GptOssConfig().sliding_window, None]
    assert windows(architectures=gpt_oss, sliding_window=None) == [None] * 2


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_gpt_oss_stretches_its_context_unless_it_says_otherwise(tiny, key):
    rest = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "architectures": ["GptOssForCausalLM"],
    }
    tiny.write_config(**rest, rope_theta=...)
    own = GptOssConfig().rope_parameters
    rope = read_config(tiny.directory).layers[0].rope
    assert rope.theta == own["rope_theta"]
    assert isinstance(rope.scaling, YarnRope)
    assert rope.scaling.factor == own["factor"]
    assert rope.scaling.original_context == own["original_max_position_embeddings"]
    assert (rope.scaling.beta_fast, rope.scaling.beta_slow) == (own["beta_fast"], own["beta_slow"])
    assert rope.scaling.truncate == own["truncate"]
    tiny.write_config(**rest, **{key: None})
    assert read_config(tiny.directory).layers[0].rope.scaling == rope.scaling
    tiny.write_config(**rest, **{key: {"rope_type": "linear", "factor": 2.0}})
    assert read_config(tiny.directory).layers[0].rope.scaling == LinearRope(2.0)
