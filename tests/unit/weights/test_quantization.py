from __future__ import annotations

import json
import time

import pytest

from splitserve.errors import CheckpointError
from splitserve.weights.quantization import (
    AwqCodes,
    GptqCodes,
    Mxfp4Codes,
    PackedCodes,
    ScaledCodes,
    read_quantization,
)

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
BLOCKS = {"strategy": "block", "block_structure": [128, 64]}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def group(weights, inputs=None, **more):
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs} | more


def compressed(stored="pack-quantized", weights=INT4, inputs=None, **more):
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group(weights, inputs)},
    } | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.fixture
def read(tmp_path):
    def read(config):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        return read_quantization(tmp_path)

    return read


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (compressed(), PackedCodes(4, 32, False, False)),
        (compressed(weights=INT4 | {"num_bits": 8}), PackedCodes(8, 32, False, False)),
        (
            compressed(weights=INT4 | {"strategy": "channel", "symmetric": True}),
            PackedCodes(4, 0, True, False),
        ),
        (
            compressed("float-quantized", FP8, DYNAMIC),
            ScaledCodes("fp8", (1, 0), quantizes_input=True),
        ),
        (
            compressed("float-quantized", FP8 | {"strategy": "tensor"}, STATIC),
            ScaledCodes("fp8", (0, 0), quantizes_input=True, input_scale=True),
        ),
        (
            compressed("naive-quantized", FP8 | {"type": "int"}),
            ScaledCodes("int8", (1, 0)),
        ),
        (
            compressed("float-quantized", FP8 | BLOCKS),
            ScaledCodes("fp8", (128, 64)),
        ),
        (AWQ, AwqCodes(128)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, AwqCodes(64)),
        (GPTQ, GptqCodes(4, 128, True)),
        (GPTQ | {"group_size": -1, "bits": 8}, GptqCodes(8, 0, True)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, GptqCodes(4, 128, False)),
        (MODELOPT, ScaledCodes("fp8", (0, 0), quantizes_input=True, input_scale=True)),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            ScaledCodes("fp8", (128, 128), scale_name="weight_scale_inv"),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            ScaledCodes("fp8", (0, 0), quantizes_input=True, input_scale=True),
        ),
        ({"quant_method": "mxfp4"}, Mxfp4Codes()),
    ],
)  # fmt: skip
def test_schemes(read, config, expected):
    assert read(config).scheme("model.layers.0.mlp.up_proj") == expected


def test_a_plain_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_quantization(tmp_path) is None


def test_modelopts_own_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    own = {"producer": {"name": "modelopt"},
           "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
                            "exclude_modules": ["lm_head", "*.gate"]}}  # fmt: skip
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
    quantization = read_quantization(tmp_path)
    assert quantization.scheme("lm_head") is None
    assert quantization.scheme("model.layers.3.mlp.gate") is None
    assert quantization.scheme("model.layers.3.mlp.gate_proj").kind == "fp8"


def test_groups_of_modules(read):
    config = compressed(
        "mixed-precision",
        config_groups={
            "a": group(INT4, targets=[r"re:.*\.mlp\..*"], format="pack-quantized"),
            "b": group(FP8, targets=["model.layers.0.self_attn.q_proj"], format="float-quantized"),
        },
        ignore=["model.layers.1.mlp.up_proj", r"re:.*\.2\."],
    )
    quantization = read(config)
    assert isinstance(quantization.scheme("model.layers.0.mlp.up_proj"), PackedCodes)
    assert isinstance(quantization.scheme("model.layers.0.self_attn.q_proj"), ScaledCodes)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj",
                   "model.layers.2.mlp.up_proj", "lm_head"):  # fmt: skip
        assert quantization.scheme(module) is None, module


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "other_lm_head", False),
        ("visual", "model.visual.blocks.0.qkv", True),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", True),
        ("model.layers.1*", "model.layers.13.mlp", True),
        ("*router*", "model.layers.1.mlp.router", True),
    ],
)
def test_paths(read, pattern, module, found):
    scheme = read(AWQ | {"modules_to_not_convert": [pattern]}).scheme(module)
    assert (scheme is None) == found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "quant_method is missing"),
        ({"quant_method": 7}, "quant_method is 7, must be a string"),
        (
            {"quant_method": "bitsandbytes"},
            "quant_method 'bitsandbytes' is not supported; supported:",
        ),
        (AWQ | {"bits": 8}, "bits 8 is not supported; supported: 4"),
        (AWQ | {"version": "gemv"}, "version 'gemv' is not supported; supported: gemm"),
        (AWQ | {"zero_point": False}, "zero_point false is not supported"),
        (AWQ | {"group_size": 0}, "group_size is 0, must be -1 or 1 to"),
        (AWQ | {"group_size": "all"}, "group_size is 'all', must be a whole number"),
        (AWQ | {"modules_to_not_convert": [3]}, "modules_to_not_convert must be a list of strings"),
        (AWQ | {"modules_to_not_convert": ["x" * 999]}, "has an entry of 999 characters"),
        (AWQ | {"modules_to_not_convert": ["x"] * 20_000}, "has 20000 entries"),
        (GPTQ | {"bits": 3}, "bits 3 is not supported; supported: 4, 8"),
        (GPTQ | {"bits": None}, "bits is missing"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format true is not supported"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic (options of single modules) is not"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        (GPTQ | {"group_size": -2}, "group_size is -2, must be -1 or"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported; supported: FP8"),
        (MODELOPT | {"quant_algo": None}, "quant_algo is missing"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4' is not"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ({"quant_method": "fp8", "activation_scheme": "x"}, "activation_scheme 'x' is not"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [8, 8]},
            "activation_scheme 'static' is not supported with blocks",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [8]},
            "weight_block_size is [8], must be two",
        ),
        (
            compressed(inputs=DYNAMIC),
            "config_groups.group_0.input_activations.type 'float' is not supported with weights of",
        ),
        (
            compressed("float-quantized", FP8, DYNAMIC | {"type": "int"}),
            "input_activations.type 'int' is not supported with weights of 'float'",
        ),
        (compressed(config_groups={}), "config_groups is missing or empty"),
        (
            compressed(config_groups={"W4A16": ["Linear"]}),
            "config_groups.W4A16 is ['Linear'], must",
        ),
        (
            compressed("marlin-24"),
            "format 'marlin-24' is not supported; supported: float-quantized",
        ),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (compressed(weights=INT4 | {"num_bits": 3}), "weights.num_bits 3 of type 'int' is not"),
        (
            compressed(weights=INT4 | {"type": "float"}),
            "num_bits 4 of type 'float' is not supported",
        ),
        (compressed(weights=INT4 | {"strategy": "tensor"}), "must be 'group' or 'channel'"),
        (compressed(weights=INT4 | {"strategy": "odd"}), "weights.strategy 'odd' is not supported"),
        (compressed(weights=INT4 | {"group_size": 0}), "weights.group_size is 0, must be -1 or"),
        (compressed("int-quantized"), "num_bits 4 of type 'int' is not supported in int-quantized"),
        (compressed(inputs=DYNAMIC | {"num_bits": 4}), "input_activations.num_bits 4 is not"),
        (compressed(inputs=DYNAMIC | {"symmetric": False}), "symmetric false is not supported"),
        (compressed(inputs=DYNAMIC | {"dynamic": "local"}), "dynamic is 'local', must be true or"),
        (compressed(inputs=STATIC | {"strategy": "group"}), "strategy 'group' is not supported"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not"),
        (compressed(transform_config={"config_groups": {}}), "transform_config is not supported"),
        (
            compressed(config_groups={"a": group(INT4, output_activations={"num_bits": 8})}),
            "output_activations is not supported",
        ),
        (compressed(ignore=["re:("]), "ignore has '(', which is no regular expression"),
        (compressed(ignore=["re:(a+)+b"]), "ignore has the pattern '(a+)+b', which may take too"),
        (compressed(ignore=["re:" + ".*" * 9]), "which may take too long to match"),
    ],
)
def test_refused(tmp_path, read, config, expected):
    with pytest.raises(CheckpointError) as caught:
        read(config)
    message = caught.value.message
    assert message.startswith(f"{tmp_path / 'config.json'}: quantization_config")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        compressed(ignore=["re:" + ".*" * 6 + "!"]),
        AWQ | {"modules_to_not_convert": ["*a" * 255 + "!"]},
    ],
)
def test_patterns_cannot_take_long(read, config):
    quantization = read(config)
    start = time.process_time()
    assert quantization.scheme("model.layers.17.self_attn.a_proj" + ".a" * 10) is not None
    assert time.process_time() - start < 5
