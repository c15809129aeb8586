"""Families with a mixture of experts, and the mixture itself."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from splitserve.errors import CheckpointError
from splitserve.models.config import ExpertsConfig, MlpConfig
from splitserve.models.layers.activation import make_activation
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.linear import Linear, PlainLinear, TiledLinear
from splitserve.models.rope import YarnRope

from . import parity
from .checks import test_parity  # noqa: F401
from .config_json import changed, read, rewritten
from .parity import Case
from .published_experts import PUBLISHED

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CASES = [
    Case("mixtral", MixtralConfig(**SMALL, intermediate_size=40, num_local_experts=4)),
    Case(
        "mixtral-window-top1",
        MixtralConfig(
            **SMALL,
            intermediate_size=24,
            num_local_experts=6,
            num_experts_per_tok=1,
            sliding_window=13,
            head_dim=16,
        ),
    ),
    Case(
        "qwen3-moe",
        Qwen3MoeConfig(
            **SMALL,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            head_dim=16,
        ),
    ),
    Case(
        "qwen3-moe-some-dense",
        Qwen3MoeConfig(
            **{**SMALL, "num_hidden_layers": 5},
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=11,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        "gpt-oss",
        GptOssConfig(
            **SMALL,
            intermediate_size=24,
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=3,
            sliding_window=13,
        ),
    ),
    Case(
        "gpt-oss-two-full-one-sliding",
        GptOssConfig(
            **SMALL,
            intermediate_size=40,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=1,
            sliding_window=9,
            layer_types=["full_attention", "full_attention", "sliding_attention"],
            swiglu_limit=0.7,
            attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
]


def test_mxfp4(tmp_path: Path) -> None:
    """Experts as gpt-oss publishes them: the logits are those of the values that are meant."""
    config = GptOssConfig(
        **SMALL | {"hidden_size": 64},
        intermediate_size=32,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=13,
    )
    model = parity.random_model(config, seed=5)
    blocks = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                codes, exponents = _random_fp4(weight.shape)
                weight.copy_(_fp4_values(codes, exponents).transpose(1, 2))
                blocks[f"{name}_blocks"], blocks[f"{name}_scales"] = codes, exponents
    path = parity.save(model, tmp_path / "model")
    _replace_experts(path, blocks)

    engine = parity.open_engine(path)
    prompt = parity.prompt_of(engine.spec.vocab_size, seed=3)
    expected = parity.expected_logits(model, prompt)
    found = parity.chunked_logits(engine, prompt)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < parity.MAX_LOGIT_ERROR


def _random_fp4(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Blocks (experts, out, groups, 16) of two codes a byte and their exponents, as stored, for
    a parameter of shape (experts, in, out).
    """
    experts, width, height = shape
    generator = torch.Generator().manual_seed(width)
    size = (experts, height, width // 32)
    codes = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(121, 125, size, dtype=torch.uint8, generator=generator)


def _fp4_values(codes: Tensor, exponents: Tensor) -> Tensor:
    """(experts, out, in) by the formats' definitions: E2M1, the low half of a byte first, and
    E8M0.
    """
    halves = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    sign = 1.0 - 2.0 * (halves >> 3)
    exponent, mantissa = halves >> 1 & 3, (halves & 1) / 2.0
    small, normal = mantissa, (1 + mantissa) * 2.0 ** (exponent - 1)
    values = sign * torch.where(exponent == 0, small, normal)
    return (values * 2.0 ** (exponents.int() - 127)[..., None]).flatten(-2)


def _replace_experts(path: Path, blocks: dict[str, Tensor]) -> None:
    """Puts blocks in the place of the plain weights."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in blocks:
        tensors.pop(name.removesuffix("_blocks"), None)
    save_file(tensors | blocks, file)
    config = json.loads((path / "config.json").read_text())
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [*plain, "lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("softmax", ["all", "chosen"])
def test_a_tokens_sum_does_not_depend_on_its_neighbours(
    softmax: Literal["all", "chosen"], top_k: int
) -> None:
    """Bit by bit, where products do not."""
    config = ExpertsConfig(MlpConfig(24), count=12, top_k=top_k, softmax=softmax)
    generator = torch.Generator().manual_seed(1)

    def linear(rows: int, columns: int) -> Linear:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return TiledLinear(PlainLinear(weight.bfloat16(), None))

    activate = make_activation(config.mlp)
    mlps = {index: Mlp(linear(48, 16), linear(16, 24), activate) for index in range(12)}
    router = linear(12, 16)
    experts = Experts(config, router, mlps)
    x = torch.randn(37, 16, generator=generator).bfloat16()
    together = experts(x)
    assert (together.abs().sum(1) > 0).all()
    for first, end in ((0, 1), (36, 37), (5, 7), (3, 30)):
        assert torch.equal(experts(x[first:end]), together[first:end])
    # The ranks of a group have some each.
    parts = [range(5), range(5, 12)]
    ranks = [Experts(config, router, {i: mlps[i] for i in part}) for part in parts]
    for rows in (x[:1], x):
        total = sum(rank(rows).float() for rank in ranks)
        torch.testing.assert_close(total, experts(rows).float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_form(name: str, tmp_path: Path) -> None:
    """Read as what transformers makes of it, which parity is proved for."""
    old = read(tmp_path, PUBLISHED[name])
    assert read(tmp_path, rewritten(deepcopy(PUBLISHED[name]))) == old
    assert all(layer.has_experts for layer in old.layers)


def test_gpt_oss_20b(tmp_path: Path) -> None:
    values = PUBLISHED["gpt-oss-20b"]
    config = read(tmp_path, values)
    assert read(tmp_path, {**values, "layer_types": None}) == config
    rope = config.layers[0].rope
    assert [layer.window for layer in config.layers] == [128, None] * 12
    assert rope
    assert rope.theta == 150000.0
    assert rope.scaling == YarnRope(
        factor=32.0,
        original_context=4096,
        attention_factor=0.1 * math.log(32) + 1,
        truncate=False,
    )
    assert config.experts
    assert (config.experts.count, config.experts.top_k) == (32, 4)
    assert config.max_context_tokens == 131072


@pytest.mark.parametrize(
    ("config", "key", "value", "said"),
    [
        (GptOssConfig, "swiglu_alpha", 1.5, "swiglu_alpha is 1.5, supported: 1.702"),
        (GptOssConfig, "swiglu_limit", 0.0, "swiglu_limit is 0.0"),
        (Qwen3MoeConfig, "decoder_sparse_step", 0, "decoder_sparse_step is 0"),
        (Qwen3MoeConfig, "num_experts_per_tok", 200, "num_experts_per_tok is 200, must be 1 to"),
        (MixtralConfig, "hidden_act", "mish", "hidden_act 'mish' is not supported"),
    ],
)
def test_refused(
    config: type[PretrainedConfig], key: str, value: object, said: str, tmp_path: Path
) -> None:
    """What would change the arithmetic and is not implemented."""
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path, changed(config(**SMALL), **{key: value}))
