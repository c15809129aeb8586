from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.errors import CheckpointError
from splitserve.quant.matrix import QuantizedMatrix

from . import packing
from .packing import EXAMPLES, MODULE, Example

KINDS = {"gptq": "int4", "awq": "int4", "packed": "int4", "fp8": "fp8", "int8": "int8",
         "modelopt": "fp8", "mxfp4": "int8"}  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_values(tmp_path, rng, name):
    example: Example = EXAMPLES[name](rng)
    matrix = example.save(tmp_path).read(example.source)
    assert isinstance(matrix, QuantizedMatrix)
    assert matrix.kind == ("int8" if "8 bits" in name else KINDS[name.split()[0]])
    assert matrix.shape == example.weight.shape
    assert matrix.codes.is_contiguous()
    assert matrix.scales.dtype == torch.float32
    assert torch.equal(matrix.dequantize(torch.float32), example.weight)
    if matrix.kind == "int4":
        assert int(matrix.codes.min()) >= -8
        assert int(matrix.codes.max()) <= 15
    assert (matrix.zeros is None) == (
        "symmetric" in name or matrix.kind == "fp8" or name in ("int8", "mxfp4")
    )
    assert (matrix.input_order is not None) == ("act-order" in name)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_part_is_a_part_of_the_whole(tmp_path, data):
    """Any rows and any columns, also those that cut words, blocks and groups."""
    make = data.draw(st.sampled_from(list(EXAMPLES.values())))
    example: Example = make(np.random.default_rng(1))
    height, width = example.weight.shape
    rows = data.draw(st.none() | st.lists(_range(height, 2), min_size=1, max_size=3).map(tuple))
    columns = data.draw(st.none() | _range(width, 1))
    source = replace(example.source, rows=rows, columns=columns)
    part = example.save(tmp_path).read(source)
    if isinstance(part, QuantizedMatrix):
        part = part.dequantize(torch.float32)
    row_numbers = [n for span in rows or [range(height)] for n in span]
    expected = example.weight[row_numbers][:, list(columns or range(width))]
    assert part.shape == source.read_shape
    assert torch.equal(part, expected)


def _range(size: int, most_step: int):
    return st.builds(
        lambda a, b, step: range(min(a, b), max(a, b) + 1, step),
        st.integers(0, size - 1), st.integers(0, size - 1), st.integers(1, most_step),
    )  # fmt: skip


def test_a_cut_group_keeps_its_scale_in_smaller_groups(tmp_path, rng):
    example = packing.awq(rng, group=32)
    part = example.save(tmp_path).read(replace(example.source, columns=range(16, 48)))
    assert part.group_size == 16
    assert torch.equal(part.dequantize(torch.float32), example.weight[:, 16:48])


def test_part_of_the_columns_of_act_order_is_dense(tmp_path, rng):
    example = packing.gptq(rng, act_order=True)
    opened = example.save(tmp_path)
    part = opened.read(replace(example.source, columns=range(32)), torch.bfloat16)
    assert isinstance(part, torch.Tensor)
    assert torch.equal(part, example.weight[:, :32].bfloat16())
    rows = opened.read(replace(example.source, rows=(range(8),)))
    assert isinstance(rows, QuantizedMatrix)


def test_order_is_of_the_input(tmp_path, rng):
    example = packing.gptq(rng, act_order=True)
    matrix = example.save(tmp_path).read(example.source)
    x = torch.randn(3, 64)
    plain = QuantizedMatrix(matrix.kind, matrix.codes, matrix.scales, matrix.zeros)
    product = x[:, matrix.input_order] @ plain.dequantize(torch.float32).T
    assert torch.allclose(product, x @ example.weight.T, atol=1e-3)


def test_activations(tmp_path, rng):
    def read(example: Example) -> QuantizedMatrix:
        return example.save(tmp_path).read(example.source)

    assert (read(packing.fp8(rng)).quantizes_input, read(packing.fp8(rng)).input_scale) == (
        True,
        None,
    )
    assert read(packing.fp8(rng, static=True)).input_scale == 0.25
    assert read(packing.modelopt(rng)).input_scale == 0.125
    assert read(packing.int8(rng)).quantizes_input
    assert not read(packing.packed(rng)).quantizes_input


def test_smoothing_is_read(tmp_path, rng):
    example = packing.int8(rng)
    smoothing = torch.rand(64) + 0.5
    example.tensors[f"{MODULE}.input_smoothing"] = smoothing
    matrix = example.save(tmp_path).read(replace(example.source, columns=range(16, 32)))
    assert torch.equal(matrix.smoothing, smoothing[16:32])
    assert torch.allclose(matrix.dequantize(torch.float32), (example.weight / smoothing)[:, 16:32])


def test_fine_grained_fp8(tmp_path, rng):
    example = packing.fp8(rng, strategy="block")
    example.tensors[f"{MODULE}.weight_scale_inv"] = example.tensors.pop(f"{MODULE}.weight_scale")
    example.config = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    matrix = example.save(tmp_path).read(example.source)
    assert torch.equal(matrix.dequantize(torch.float32), example.weight)
    assert matrix.group_size == 16


def test_modules_that_are_left_alone(tmp_path, rng):
    example = packing.packed(rng)
    plain = torch.randn(4, 6)
    example.tensors |= {"lm_head.weight": plain, "model.layers.0.mlp.gate.weight": plain.clone()}
    example.config["ignore"] = ["lm_head", r"re:.*\.mlp\.gate$"]
    opened = example.save(tmp_path)
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight"):
        source = replace(example.source, name=name, shape=(4, 6))
        assert torch.equal(opened.read(source), plain)


def test_gptq_leaves_the_head_alone_without_saying_so(tmp_path, rng):
    example = packing.gptq(rng)
    plain = torch.randn(4, 6)
    example.tensors["lm_head.weight"] = plain
    source = replace(example.source, name="lm_head.weight", shape=(4, 6))
    assert torch.equal(example.save(tmp_path).read(source), plain)


def test_an_ignored_module_must_be_plain(tmp_path, rng):
    example = packing.fp8(rng)
    example.config["ignore"] = [MODULE]
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is of type F8_E4M3, which holds"):
        example.save(tmp_path).find(example.source)


def test_mxfp4_equals_transformers(tmp_path, rng):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    example = packing.mxfp4(rng, index=1)
    theirs = convert_moe_packed_tensors(
        example.tensors[f"{example.name}_blocks"],
        example.tensors[f"{example.name}_scales"],
        dtype=torch.float32,
    )
    matrix = example.save(tmp_path).read(example.source)
    # transformers holds experts as (in, out).
    assert torch.equal(matrix.dequantize(torch.float32), theirs[1].T)
