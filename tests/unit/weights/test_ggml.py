from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from splitserve.errors import CheckpointError
from splitserve.weights import open_checkpoint
from splitserve.weights.source import MatrixSource, TensorSource

from .conftest import gguf_name, permute

BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes that are finite numbers in every type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (rows, columns // block, block_bytes)
    data = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    # Halves are at the start of a block, Q6_K's at its end: below 2, so all is finite.
    high = slice(208, 210) if kind == "Q6_K" else slice(0, 4)
    data[:, :, high] &= 63
    return data.reshape(rows, -1)


def write_blocks(tiny, kind: str, name: str, rows: int, columns: int) -> tuple[np.ndarray, str]:
    data = random_blocks(kind, rows, columns)
    tiny.tensors.pop(f"{name}.weight")
    stored = gguf.GGMLQuantizationType[kind]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(gguf_name(f"{name}.weight"), data, raw_dtype=stored)

    path = tiny.write_gguf(add)
    return gguf.dequantize(data, stored).astype(np.float32), path


@pytest.mark.parametrize("kind", ["F16", "BF16", *BLOCKS])
def test_types_are_dequantised(tiny, kind):
    """Against the reference formulas of the gguf library, through our own header reader."""
    name = "model.layers.0.mlp.down_proj"
    expected, path = write_blocks(tiny, kind, name, 16, 512)
    assert np.isfinite(expected).all()
    source = TensorSource(f"{name}.weight", (16, 512))
    got = open_checkpoint(path).tensor(source, torch.float32)
    assert np.array_equal(got.numpy(), expected)
    some = replace(source, rows=(range(3, 7), range(1)))
    got = open_checkpoint(path).tensor(some, torch.float32)
    assert np.array_equal(got.numpy(), expected[[3, 4, 5, 6, 0]])


@pytest.mark.parametrize("kind", BLOCKS)
def test_projections_keep_their_codes(tiny, kind):
    name = "model.layers.0.mlp.down_proj"
    expected, path = write_blocks(tiny, kind, name, 16, 512)
    checkpoint = open_checkpoint(path)
    source = MatrixSource(f"{name}.weight", (16, 512))
    checkpoint.check_matrix(source)
    whole = checkpoint.matrix(source, torch.bfloat16)
    assert whole.kind == ("int4" if kind in ("Q4_0", "Q4_1", "Q4_K") else "int8")
    assert whole.group_size == (16 if kind == "Q6_K" else 32)
    assert (whole.zeros is None) == (kind in ("Q4_0", "Q5_0", "Q8_0", "Q6_K"))
    close(whole.dequantize(torch.float32), expected)
    # A part that starts and ends within a block of 256 and, in the second case, within a group.
    for columns in (range(96, 352), range(40, 488)):
        part = replace(source, rows=(range(9, 12), range(2, 3)), columns=columns)
        got = checkpoint.matrix(part, torch.float32).dequantize(torch.float32)
        close(got, expected[[9, 10, 11, 2]][:, columns.start : columns.stop])


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    """Minima become zeros, which costs a rounding of the largest number of a group."""
    assert got.shape == expected.shape
    scale = np.abs(expected).max()
    assert np.allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6 * scale)


def test_groups_without_a_scale_hold_their_minimum(tiny):
    name = "model.layers.0.mlp.down_proj"
    del tiny.tensors[f"{name}.weight"]
    block = np.zeros((16, 20), np.uint8)
    block[:, 4:] = 0x5A
    block[:, :4] = np.array([0, 1.5], "<f2").view(np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(
            gguf_name(f"{name}.weight"), block, raw_dtype=gguf.GGMLQuantizationType.Q4_1
        )

    checkpoint = open_checkpoint(tiny.write_gguf(add))
    matrix = checkpoint.matrix(MatrixSource(f"{name}.weight", (16, 32)), torch.float32)
    assert torch.equal(matrix.dequantize(torch.float32), torch.full((16, 32), 1.5))


@pytest.mark.parametrize("half", [0, 1])
def test_scales_and_minima_are_numbers(tiny, half):
    name = "model.layers.0.mlp.down_proj"
    del tiny.tensors[f"{name}.weight"]
    block = np.ones((16, 20), np.uint8)
    block[7, 2 * half : 2 * half + 2] = np.array([np.nan], "<f2").view(np.uint8)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(
            gguf_name(f"{name}.weight"), block, raw_dtype=gguf.GGMLQuantizationType.Q4_1
        )

    checkpoint = open_checkpoint(tiny.write_gguf(add))
    with pytest.raises(CheckpointError, match="has numbers that are not finite"):
        checkpoint.matrix(MatrixSource(f"{name}.weight", (16, 32)), torch.float32)


def test_rows_of_heads_are_in_hugging_face_order(tiny):
    """Plain and quantised, the whole and any part of it."""
    name = "model.layers.0.self_attn.q_proj"
    plain = tiny.tensors[f"{name}.weight"]
    source = MatrixSource(f"{name}.weight", (16, 16))
    spans = [(range(16),), (range(4, 8),), (range(5, 7), range(1, 11)), (range(15, 16),)]
    checkpoint = open_checkpoint(tiny.write_gguf())
    for rows in spans:
        numbers = [n for span in rows for n in span]
        got = checkpoint.matrix(replace(source, rows=rows), torch.float32)
        assert torch.equal(got, plain[numbers])
    del tiny.tensors[f"{name}.weight"]
    wide = torch.randn(16, 32)
    stored = gguf.quants.quantize(
        permute(f"{name}.weight", wide.numpy()), gguf.GGMLQuantizationType.Q8_0
    )

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(
            gguf_name(f"{name}.weight"), stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )

    checkpoint = open_checkpoint(tiny.write_gguf(add))
    source = MatrixSource(f"{name}.weight", (16, 32))
    for rows in spans:
        numbers = [n for span in rows for n in span]
        got = checkpoint.matrix(replace(source, rows=rows), torch.float32)
        assert torch.allclose(got.dequantize(torch.float32), wide[numbers], atol=0.02)


def test_a_quantised_vector_is_refused(tiny):
    del tiny.tensors["model.norm.weight"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output_norm.weight", np.zeros(34, np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip

    checkpoint = open_checkpoint(tiny.write_gguf(add))
    with pytest.raises(CheckpointError, match="is of type Q8_0, which holds no plain weights"):
        checkpoint.check_tensor(TensorSource("model.norm.weight", (32,)))
