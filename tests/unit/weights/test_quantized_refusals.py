from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitserve.errors import CheckpointError

from . import packing
from .packing import EXAMPLES, MODULE, Example


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def drop(suffix: str):
    def edit(example: Example) -> None:
        del example.tensors[f"{MODULE}.{suffix}"]

    return edit


def reshape(suffix: str, *shape: int):
    def edit(example: Example) -> None:
        tensor = example.tensors[f"{MODULE}.{suffix}"]
        example.tensors[f"{MODULE}.{suffix}"] = torch.zeros(shape, dtype=tensor.dtype)

    return edit


def retype(suffix: str, dtype: torch.dtype):
    def edit(example: Example) -> None:
        example.tensors[f"{MODULE}.{suffix}"] = example.tensors[f"{MODULE}.{suffix}"].to(dtype)

    return edit


def add(suffix: str):
    def edit(example: Example) -> None:
        example.tensors[f"{MODULE}.{suffix}"] = torch.zeros(1, dtype=torch.int32)

    return edit


def option(key: str, value: object):
    def edit(example: Example) -> None:
        group = example.config.get("config_groups", {}).get("group_0", {}).get("weights")
        (example.config if group is None else group)[key] = value

    return edit


REFUSED = [
    ("gptq", drop("qweight"), "up_proj.qweight' is missing, the model needs it of shape (8, 16)"),
    ("gptq", drop("qzeros"), "up_proj.qzeros' is missing, the model needs it of shape (4, 2)"),
    ("gptq", drop("scales"), "up_proj.scales' is missing, the model needs it of shape (4, 16)"),
    ("gptq", reshape("qweight", 16, 8), "qweight' has shape (16, 8), the model needs (8, 16)"),
    ("gptq", reshape("qzeros", 4, 3), "qzeros' has shape (4, 3), the model needs (4, 2)"),
    ("gptq", reshape("scales", 5, 16), "scales' has shape (5, 16), the model needs (4, 16)"),
    ("gptq", reshape("g_idx", 63), "g_idx' has shape (63,), the model needs (64,)"),
    ("gptq", retype("qweight", torch.int64), "qweight' is of type I64, expected I32"),
    ("gptq", retype("scales", torch.int32), "scales' is of type I32, expected BF16 or F16 or F32"),
    ("gptq", option("group_size", 48), "in groups of 48, which do not divide its 64 columns"),
    ("awq", drop("qweight"), "up_proj.qweight' is missing, the model needs it of shape (64, 2)"),
    ("awq", drop("qzeros"), "up_proj.qzeros' is missing, the model needs it of shape (4, 2)"),
    ("awq", drop("scales"), "up_proj.scales' is missing, the model needs it of shape (4, 16)"),
    ("awq", reshape("qweight", 8, 16), "qweight' has shape (8, 16), the model needs (64, 2)"),
    ("awq", retype("qzeros", torch.int16), "qzeros' is of type I16, expected I32"),
    ("awq", option("group_size", 24), "in groups of 24, which do not divide its 64 columns"),
    ("packed", drop("weight_packed"), "weight_packed' is missing"),
    ("packed", drop("weight_scale"), "weight_scale' is missing"),
    ("packed", drop("weight_zero_point"), "weight_zero_point' is missing"),
    ("packed", drop("weight_shape"), "weight_shape' is missing"),
    ("packed", reshape("weight_packed", 13, 9), "(13, 9), the model needs (13, 8)"),
    ("packed", reshape("weight_zero_point", 13, 4), "(13, 4), the model needs (2, 4)"),
    ("packed", retype("weight_packed", torch.uint8), "is of type U8, expected I32"),
    ("packed", option("group_size", 48), "in groups of 48, which do not divide its 64 columns"),
    ("fp8 channels", drop("weight"), "up_proj.weight' is missing"),
    ("fp8 channels", drop("weight_scale"), "weight_scale' is missing"),
    ("fp8 channels", reshape("weight_scale", 23, 1), "(23, 1), the model needs (24, 1) or (24,)"),
    ("fp8 channels", retype("weight", torch.int8), "weight' is of type I8, expected F8_E4M3"),
    ("fp8 channels", retype("weight", torch.float8_e5m2), "is of type F8_E5M2, expected F8_E4M3"),
    ("fp8 blocks", option("block_structure", [8, 24]), "in groups of 24, which do not divide"),
    ("fp8 static", drop("input_scale"), "input_scale' is missing"),
    ("int8", retype("weight", torch.float8_e4m3fn), "weight' is of type F8_E4M3, expected I8"),
    ("int8 with zeros", drop("weight_zero_point"), "weight_zero_point' is missing"),
    ("packed", option("symmetric", True), "weight_zero_point' is stored, though the config says"),
    ("int8", add("weight_zero_point"), "that its weights are symmetric: true"),
    ("modelopt", drop("input_scale"), "input_scale' is missing, the model needs it of shape ()"),
    ("modelopt", reshape("weight_scale", 24, 1), "(24, 1), the model needs (1, 1) or (1,) or ()"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "expected"), REFUSED)
def test_refused_by_the_headers(tmp_path, rng, name, edit, expected):
    example = EXAMPLES[name](rng)
    edit(example)
    opened = example.save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        opened.find(example.source)
    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert MODULE in caught.value.message


def fill(suffix: str, value: float):
    def edit(example: Example) -> None:
        example.tensors[f"{MODULE}.{suffix}"].fill_(value)

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("gptq", fill("g_idx", 0), "g_idx' does not put 16 columns in each of 4 groups"),
        ("gptq", fill("g_idx", 4), "g_idx' does not put 16 columns in each of 4 groups"),
        ("gptq", fill("g_idx", -7), "g_idx' does not put 16 columns in each of 4 groups"),
        ("packed act-order", fill("weight_g_idx", 1 << 30), "does not put 16 columns in each of 4"),
        ("packed", fill("weight_shape", 64), "holds (64, 64), the model needs (13, 64)"),
        ("gptq", fill("scales", float("nan")), "scales' has numbers that are not finite"),
        ("awq", fill("scales", float("inf")), "scales' has numbers that are not finite"),
        ("packed", fill("weight_scale", float("nan")), "weight_scale' has numbers that are not"),
        ("fp8 blocks", fill("weight_scale", float("-inf")), "weight_scale' has numbers that are"),
        ("fp8 static", fill("input_scale", 0), "input_scale' is 0.0, expected a positive number"),
        ("fp8 static", fill("input_scale", float("nan")), "is nan, expected a positive number"),
    ],
)
def test_refused_by_the_content(tmp_path, rng, name, edit, expected):
    example = EXAMPLES[name](rng)
    edit(example)
    matrix = example.save(tmp_path).find(example.source)
    with pytest.raises(CheckpointError) as caught:
        matrix.read(torch.float32)
    assert expected in caught.value.message
    assert MODULE in caught.value.message


@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "fp8 channels"])
def test_stacks_are_refused(tmp_path, rng, name):
    example = EXAMPLES[name](rng)
    opened = example.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a stack of 3, expected plain numbers"):
        opened.find(replace(example.source, stack=3))


@pytest.mark.parametrize(
    ("suffix", "change", "expected"),
    [
        ("_blocks", None, "gate_up_proj_blocks' is missing, the model needs it of shape (3, 12, 3"),
        (
            "_scales",
            None,
            "gate_up_proj_scales' is missing, the model needs it of shape (3, 12, 3)",
        ),
        ("_blocks", (3, 12, 2, 16), "has shape (3, 12, 2, 16), the model needs (3, 12, 3, 16)"),
        ("_scales", (3, 12, 2), "has shape (3, 12, 2), the model needs (3, 12, 3)"),
    ],
)
def test_mxfp4_refused(tmp_path, rng, suffix, change, expected):
    example = packing.mxfp4(rng)
    if change is None:
        del example.tensors[example.name + suffix]
    else:
        example.tensors[example.name + suffix] = torch.zeros(change, dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        example.save(tmp_path).find(example.source)
    assert expected in caught.value.message


def test_mxfp4_scales_are_numbers(tmp_path, rng):
    example = packing.mxfp4(rng)
    example.tensors[f"{example.name}_scales"][example.index, 0, 0] = 255
    matrix = example.save(tmp_path).find(example.source)
    with pytest.raises(CheckpointError, match="_scales' has numbers that are not finite"):
        matrix.read(torch.float32)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_smoothing_divides(tmp_path, rng, value):
    example = EXAMPLES["packed"](rng)
    example.tensors[f"{MODULE}.input_smoothing"] = torch.full((64,), value)
    matrix = example.save(tmp_path).find(example.source)
    with pytest.raises(CheckpointError, match="input_smoothing' has numbers that are not"):
        matrix.read(torch.float32)


def test_gptq_zeros_are_those_stored_whatever_sym_says(tmp_path, rng):
    example = EXAMPLES["gptq"](rng)
    example.config["sym"] = True
    got = example.save(tmp_path).read(example.source).dequantize(torch.float32)
    assert torch.equal(got, example.weight)


def test_mxfp4_of_odd_width(tmp_path, rng):
    example = packing.mxfp4(rng)
    with pytest.raises(CheckpointError, match="expected a stack of matrices with a multiple of 32"):
        example.save(tmp_path).find(replace(example.source, shape=(12, 95)))
