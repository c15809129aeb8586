from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
)
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from splitserve.errors import CheckpointError

from . import parity
from .checks import test_parity  # noqa: F401
from .config_json import changed, read, rewritten
from .parity import Case
from .published_announced import PUBLISHED

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SMALL_GPT = {"vocab_size": 99, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
SMALL_MPT = {"vocab_size": 99, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 128}
MPT = MptConfig(**SMALL_MPT)
GPT2 = GPT2Config(**SMALL_GPT)
BLOOM = BloomConfig(vocab_size=99, hidden_size=32, n_layer=3, n_head=4, pretraining_tp=4)
NEW_FALCON = FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2)
# Falcon's ALiBi in transformers is rounded to bf16. Up to position 255 and with a power of two
# heads, at most 8, the rounding is none.
FALCON_RW = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "new_decoder_architecture": False,
}

CASES = [
    Case("opt", OPTConfig(**SMALL, ffn_dim=64)),
    Case(
        "opt-350m",
        OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    ),
    Case("opt-no-final-norm", OPTConfig(**SMALL, ffn_dim=64, _remove_final_layer_norm=True)),
    Case(
        "galactica",
        OPTConfig(
            **SMALL,
            ffn_dim=64,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            activation_function="gelu",
            tie_word_embeddings=False,
        ),
    ),
    Case("gptj", GPTJConfig(**SMALL_GPT, rotary_dim=4)),
    Case(
        "gptj-whole-heads-turned",
        GPTJConfig(**SMALL_GPT, rotary_dim=8, n_inner=48, tie_word_embeddings=True),
    ),
    Case("falcon-7b", FalconConfig(**SMALL)),
    Case("falcon-rw", FalconConfig(**SMALL, **FALCON_RW, ffn_hidden_size=64)),
    Case("falcon-40b", NEW_FALCON),
    Case(
        "falcon-11b",
        FalconConfig(
            **SMALL,
            new_decoder_architecture=True,
            num_kv_heads=1,
            num_ln_in_parallel_attn=1,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
        ),
    ),
    Case("falcon-biases", FalconConfig(**SMALL, bias=True, multi_query=False)),
    Case("mpt", MPT),
    Case(
        "mpt-clipped",
        MptConfig(
            **(SMALL_MPT | {"n_heads": 4}),
            attn_config={"clip_qkv": 0.7, "softmax_scale": 0.5},
            tie_word_embeddings=False,
        ),
    ),
    Case("bloom", BLOOM),
    Case(
        "bloom-14-heads",
        BloomConfig(vocab_size=98, hidden_size=56, n_layer=2, n_head=14, tie_word_embeddings=False),
    ),
    Case("gpt2", GPT2),
    Case("gpt2-unscaled", GPT2Config(**SMALL_GPT, scale_attn_weights=False, n_inner=48)),
    Case(
        "cerebras",
        GPT2Config(**SMALL_GPT, activation_function="gelu", tie_word_embeddings=False),
    ),
    Case("pythia", GPTNeoXConfig(**SMALL, intermediate_size=64)),
    Case(
        "neox-20b-gelu-fast",
        GPTNeoXConfig(
            **SMALL,
            intermediate_size=48,
            hidden_act="gelu_fast",
            rope_parameters={
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            },
        ),
        context=96,
    ),
    Case(
        "neox-sequential",
        GPTNeoXConfig(
            **SMALL,
            intermediate_size=48,
            use_parallel_residual=False,
            attention_bias=False,
            rotary_pct=0.5,
            tie_word_embeddings=True,
        ),
    ),
]


def check_logits(model: nn.Module, path: Path) -> None:
    engine = parity.open_engine(path)
    tokens = parity.prompt_of(engine.spec.vocab_size, seed=5)
    error = parity.chunked_logits(engine, tokens) - parity.expected_logits(model, tokens)
    assert error.abs().max() < parity.MAX_LOGIT_ERROR


def test_mpt_as_its_own_code_computes(tmp_path: Path) -> None:
    """transformers takes `alibi_bias_max` for 8 and leaves biases out, whatever the config says.
    Here it is given what the models were trained with.
    """
    config = MptConfig(**SMALL_MPT, no_bias=False, attn_config={"alibi_bias_max": 16})
    model = parity.random_model(config, seed=1)
    for module in model.transformer.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias = nn.Parameter(torch.randn(module.weight.shape[0]) * 0.2)
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=16)
    check_logits(model, parity.save(model, tmp_path / "model"))


# What published checkpoints hold besides: causal masks, and frequencies of rotary embedding.
EXTRA = {
    GPT2Config: {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)},
    BloomConfig: {},
    OPTConfig: {},
    GPTJConfig: {
        "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e9),
    },
    GPTNeoXConfig: {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9, dtype=torch.float16),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    },
}


@pytest.mark.parametrize("name", ["gpt2", "cerebras", "bloom", "opt-350m", "gptj", "pythia"])
def test_saved_without_the_prefix_and_with_masks(name: str, tmp_path: Path) -> None:
    """As the original GPT-2 and BLOOM are: `h.0.ln_1.weight` and not `transformer.h.0...`."""
    case = next(case for case in CASES if case.name == name)
    model = parity.random_model(case.config, seed=2)
    path = parity.save(model, tmp_path / "model")
    file, prefix = path / "model.safetensors", f"{model.base_model_prefix}."
    stored = load_file(file) | EXTRA[type(case.config)]
    save_file({key.removeprefix(prefix): tensor for key, tensor in stored.items()}, file)
    check_logits(model, path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    """Read as they are, and after transformers has renamed and completed their keys."""
    found = read(tmp_path, PUBLISHED[name])
    assert found.num_layers in (12, 24, 28, 32)
    assert read(tmp_path, rewritten(PUBLISHED[name])) == found


@pytest.mark.parametrize(
    ("config", "key", "value", "says"),
    [
        (OPTConfig(**SMALL), "scale_embeddings", True, "is True, supported: False"),
        (OPTConfig(**SMALL), "activation_function", "mish", "'mish' is not supported"),
        (GPTJConfig(**SMALL_GPT), "rotary_dim", 16, "16 dimensions, head_dim is 8"),
        (FalconConfig(**SMALL), "num_ln_in_parallel_attn", 2, "is 2, supported: 1"),
        (NEW_FALCON, "num_ln_in_parallel_attn", 3, "is 3, supported: 1, 2"),
        (NEW_FALCON, "parallel_attn", False, "is False, supported: True"),
        (BLOOM, "apply_residual_connection_post_layernorm", True, "is True, supported: False"),
        (BLOOM, "slow_but_exact", True, "is True, supported: False"),
        (GPT2, "add_cross_attention", True, "is True, supported: False"),
        (GPT2, "scale_attn_by_inverse_layer_idx", True, "is True, supported: False"),
        (MPT, "logit_scale", 0.5, "is not supported"),
        (MPT, "norm_type", "rmsnorm", "is 'rmsnorm', supported: 'low_precision_layernorm'"),
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", False),
        ("attn_type", "multiquery_attention"),
        ("attn_uses_sequence_id", True),
        ("prefix_lm", True),
        ("qk_ln", True),
        ("rope", True),
        ("sliding_window_size", 8),
    ],
)
def test_mpt_attention_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"attn_config.{key} is .*, supported: "):
        read(tmp_path, changed(MPT, attn_config={key: value}))
