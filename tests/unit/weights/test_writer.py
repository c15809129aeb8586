from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from splitserve.errors import CheckpointError
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.weights import open_checkpoint
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.writer import CheckpointWriter

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def int4(rows: int = 24, columns: int = 64, *, zeros: bool = True, group: int = 32):
    shape = (rows, columns // group)
    low, high = (0, 16) if zeros else (-8, 8)
    return QuantizedMatrix(
        kind="int4",
        codes=torch.randint(low, high, (rows, columns), dtype=torch.int8),
        scales=torch.rand(shape) + 0.5,
        zeros=torch.randint(0, 16, shape).float() if zeros else None,
    )


def int8(*, quantizes_input: bool = False, smoothing: torch.Tensor | None = None):
    return QuantizedMatrix(
        kind="int8",
        codes=torch.randint(-128, 128, (24, 64), dtype=torch.int8),
        scales=torch.rand(24, 1) + 0.5,
        quantizes_input=quantizes_input,
        smoothing=smoothing,
    )


def fp8(input_scale: float | None = None):
    return QuantizedMatrix(
        kind="fp8",
        codes=torch.randn(24, 64).to(torch.float8_e4m3fn),
        scales=torch.rand(24, 1) + 0.5,
        quantizes_input=True,
        input_scale=input_scale,
    )


MATRICES = {
    "int4": int4,
    "int4 symmetric": lambda: int4(zeros=False),
    "int4 rows": lambda: int4(group=64),
    "int4 of a row count that fills no word": lambda: int4(13),
    "int8": int8,
    "int8 with int8 inputs": lambda: int8(quantizes_input=True),
    "int8 smoothed": lambda: int8(quantizes_input=True, smoothing=torch.rand(64) + 0.5),
    "fp8": fp8,
    "fp8 with a fixed input scale": lambda: fp8(0.25),
}


def write(tiny, matrices: dict[str, QuantizedMatrix], **options) -> Path:
    directory = tiny.directory / "out" / "quantised"
    with CheckpointWriter(directory, tiny.directory, **options) as writer:
        for name, tensor in tiny.tensors.items():
            if name in matrices:
                writer.add_matrix(name, matrices[name])
            else:
                writer.add_tensor(name, tensor)
    return directory


def assert_equal(got: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    """The same numbers; where zeros start is the format's own affair."""
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.dequantize(torch.float32), expected.dequantize(torch.float32))
    for field in ("kind", "shape", "group_size", "quantizes_input", "input_scale"):
        assert getattr(got, field) == getattr(expected, field), field
    assert (got.smoothing is None) == (expected.smoothing is None)
    if expected.smoothing is not None:
        assert torch.equal(got.smoothing, expected.smoothing)


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_written_is_read_back(tiny, name):
    matrix = MATRICES[name]()
    checkpoint = open_checkpoint(write(tiny, {UP: matrix}))
    assert_equal(checkpoint.matrix(MatrixSource(UP, matrix.shape), torch.bfloat16), matrix)
    for other, tensor in tiny.tensors.items():
        if other != UP:
            source = TensorSource(other, tuple(tensor.shape))
            assert torch.equal(checkpoint.tensor(source, torch.float32), tensor)
    plain = checkpoint.matrix(MatrixSource(DOWN, (16, 24)), torch.float32)
    assert torch.equal(plain, tiny.tensors[DOWN])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_codes_are_packed_and_unpacked(tmp_path, data):
    """Codes and zeros of four bits, signed or not, round trip through the packed words."""
    from splitserve.weights.compressed_writer import stored_tensors

    from .packing import pack_along_columns

    rows, groups = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    codes = torch.randint(0, 16, (rows, groups * 8), dtype=torch.int8, generator=generator)
    zeros = torch.randint(0, 16, (rows, groups), generator=generator).float()
    signed = data.draw(st.booleans())
    codes[0, 0] = 0  # So that signed codes are seen to be that.
    matrix = QuantizedMatrix(
        "int4", codes - 8 * signed, torch.ones(rows, groups), zeros - 8.0 * signed
    )
    stored = stored_tensors("m", matrix)
    assert torch.equal(stored["m.weight_packed"], pack_along_columns(codes.numpy(), 4))
    expected = pack_along_columns(zeros.int().numpy().T, 4).T
    assert torch.equal(stored["m.weight_zero_point"], expected)


@pytest.mark.parametrize("name", MATRICES)
def test_the_compressed_tensors_package_reads_it(tiny, name):
    """Its own decompressor, on what is on disk, with the config that is on disk."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    matrix = MATRICES[name]()
    directory = write(tiny, {UP: matrix})
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    parsed = compressed_tensors.quantization.QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    (shard,) = directory.glob("*.safetensors")
    module = UP.removesuffix("weight")
    state = {
        tensor.removeprefix(module): value
        for tensor, value in load_file(shard).items()
        if tensor.startswith(module)
    }
    state = BaseCompressor.load_from_registry(parsed.format).decompress(state, scheme)
    expected = matrix.dequantize(torch.float32)
    if matrix.smoothing is not None:
        # Which the package does not know of.
        expected = expected * matrix.smoothing
    assert torch.allclose(state["weight"], expected, rtol=1e-5, atol=1e-5)
    assert scheme.targets == ["Linear"]
    assert parsed.ignore == sorted(
        each.removesuffix(".weight")
        for each, tensor in tiny.tensors.items()
        if tensor.dim() == 2 and each != UP
    )
    assert (scheme.input_activations is not None) == matrix.quantizes_input


def test_modules_may_differ(tiny):
    first, second = int4(), fp8()
    directory = write(tiny, {UP: first, UP.replace("layers.0", "layers.1"): second})
    checkpoint = open_checkpoint(directory)
    assert_equal(checkpoint.matrix(MatrixSource(UP, (24, 64)), torch.float32), first)
    other = MatrixSource(UP.replace("layers.0", "layers.1"), (24, 64))
    assert_equal(checkpoint.matrix(other, torch.float32), second)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [
        ["model.layers.0.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]
    ]  # fmt: skip


def test_shards(tiny):
    directory = write(tiny, {UP: int4()}, max_shard_bytes=4000)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    sizes = []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            sizes.append(sum(file.get_tensor(name).nbytes for name in names))
        assert names == sorted(n for n, where in index["weight_map"].items() if where == shard.name)
        assert sizes[-1] <= 4000 or len(names) == 1
    assert sum(sizes) == index["metadata"]["total_size"]
    assert torch.equal(
        open_checkpoint(directory).tensor(TensorSource("model.norm.weight", (16,)), torch.float32),
        tiny.tensors["model.norm.weight"],
    )


def test_a_full_header_starts_another_shard(tiny):
    tiny.tensors |= {f"extra.{number:0500}": torch.zeros(1) for number in range(250)}
    directory = write(tiny, {})
    assert len(list(directory.glob("*.safetensors"))) == 2
    assert len(open_checkpoint(directory).tensor_names()) == len(tiny.tensors)


def test_the_rest_is_copied(tiny):
    for name in ("tokenizer.json", "tokenizer.model", "merges.txt", "generation_config.json",
                 "chat_template.jinja", "LICENSE"):  # fmt: skip
        (tiny.directory / name).write_text("{}")
    for name in ("quantize_config.json", "hf_quant_config.json", "model.safetensors.index.json",
                 "pytorch_model.bin", "modeling_evil.py"):  # fmt: skip
        (tiny.directory / name).write_text("{}")
    tiny.write_config(quantization_config={"quant_method": "old"}, model_type="llama")
    directory = write(tiny, {UP: int8()})
    assert {file.name for file in directory.iterdir()} == {
        "config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors",
        "tokenizer.json", "tokenizer.model", "merges.txt", "generation_config.json",
        "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_nothing_is_left_of_a_failure(tiny):
    directory = tiny.directory / "out" / "quantised"

    def fail() -> None:
        with CheckpointWriter(directory, tiny.directory) as writer:
            writer.add_tensor("model.norm.weight", tiny.tensors["model.norm.weight"])
            assert not directory.exists()
            assert len(list(directory.parent.iterdir())) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(directory.parent.iterdir()) == []


def test_refused(tiny):
    parent = tiny.directory / "out"
    parent.mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        CheckpointWriter(tiny.directory, tiny.directory)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        CheckpointWriter(parent / "new", parent)
    (parent / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot be written: Not a directory"),
        CheckpointWriter(parent / "file" / "new", tiny.directory),
    ):
        pass


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (QuantizedMatrix("int4", torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1),
                         torch.full((8, 1), 0.5)), "whole numbers of 0 to 15"),
        (QuantizedMatrix("int4", torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1),
                         torch.full((8, 1), 16.0)), "whole numbers of 0 to 15"),
        (QuantizedMatrix("int8", torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1),
                         torch.full((8, 1), 200.0)), "whole numbers of -128 to 127"),
        (QuantizedMatrix("int4", torch.full((8, 16), 16, dtype=torch.int8), torch.ones(8, 1),
                         torch.ones(8, 1)), "codes that are not of four bits"),
        (QuantizedMatrix("int4", torch.zeros(8, 12, dtype=torch.int8), torch.ones(8, 1)),
         "a matrix of 12 columns"),
        (QuantizedMatrix("int4", torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1),
                         input_order=torch.arange(16)), "an order of its input"),
    ],
)  # fmt: skip
def test_matrices_that_the_format_cannot_hold(tiny, matrix, expected):
    directory = tiny.directory / "out" / "quantised"
    with (
        pytest.raises(ValueError, match=expected),
        CheckpointWriter(directory, tiny.directory) as writer,
    ):
        writer.add_matrix(UP, matrix)
    assert not directory.exists()


def test_only_weights_of_modules_can_be_quantised(tiny):
    with (
        pytest.raises(ValueError, match="only a module's weight"),
        CheckpointWriter(tiny.directory / "out" / "quantised", tiny.directory) as writer,
    ):
        writer.add_matrix("model.experts.gate_up_proj", int8())
