from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.errors import CheckpointError
from splitserve.models.rope import FactorsRope, LinearRope
from splitserve.tokenizer import Tokenizer
from splitserve.weights import open_checkpoint
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.gguf_names import hf_name
from splitserve.weights.source import MatrixSource, TensorSource

from .conftest import permute


def refused(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_same_weights_as_in_hugging_face_order(tiny):
    checkpoint = open_checkpoint(tiny.write_gguf())
    assert list(checkpoint.tensor_names()) == sorted(tiny.tensors)
    for name, expected in tiny.tensors.items():
        got = checkpoint.tensor(TensorSource(name, tuple(expected.shape)), torch.float32)
        assert got.is_contiguous()
        assert torch.equal(got, expected), name


def test_config(tiny):
    config = open_checkpoint(tiny.write_gguf()).config
    tiny.write_single()
    theirs = open_checkpoint(tiny.directory).config
    assert config.norm.eps == pytest.approx(theirs.norm.eps)
    assert replace(config, norm=theirs.norm) == theirs


def test_no_output_tensor_means_tied(tiny):
    del tiny.tensors["lm_head.weight"]
    assert open_checkpoint(tiny.write_gguf()).config.tie_word_embeddings


def test_rope_factors_and_linear_scaling(tiny):
    def factors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array([1, 8], np.float32))

    checkpoint = open_checkpoint(tiny.write_gguf(factors))
    assert checkpoint.config.layers[0].rope.scaling == FactorsRope((1.0, 8.0))
    assert "rope_freqs.weight" not in checkpoint.tensor_names()

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    rope = open_checkpoint(tiny.write_gguf(linear)).config.layers[0].rope
    assert rope.scaling == LinearRope(4.0)


def test_types_that_are_not_supported_are_named(tiny):
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.x.weight", np.zeros((1, 74), np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.IQ2_XS)  # fmt: skip

    assert "tensor 'blk.0.x.weight' has type number 17" in refused(tiny.write_gguf(add))


def test_tensors_that_are_not_understood_are_refused(tiny):
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q_norm.weight", np.zeros(4, np.float32))

    assert "'blk.0.attn_q_norm.weight' is not one" in refused(tiny.write_gguf(add))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count is not 0"),
        (lambda w: w.add_rope_dimension_count(2), "rope.dimension_count is not the head size 4"),
        (lambda w: w.add_uint16("split.count", 3), "merge the parts into one file"),
        (lambda w: w.add_key_length(7), "rotary embedding of 7 dimensions"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'yarn' is not supported"),
        (lambda w: w.add_rope_freq_base(float("nan")), "rope_theta is nan"),
        (lambda w: w.add_custom_alignment(1 << 20), "general.alignment is 1048576"),
        (lambda w: w.add_eot_token_id(1 << 20), "outside the vocabulary"),
    ],
)
def test_metadata_that_cannot_be(tiny, edit: Callable[[gguf.GGUFWriter], None], expected):
    assert expected in refused(tiny.write_gguf(edit))


def test_identity_does_not_depend_on_the_name(tiny):
    path = tiny.write_gguf()
    first = open_checkpoint(path).identity()
    renamed = path.rename(path.with_name("other.gguf"))
    assert open_checkpoint(renamed).identity() == first
    tiny.tensors["model.norm.weight"][0] += 1
    assert open_checkpoint(tiny.write_gguf()).identity() != first


def header(
    num_tensors: int, keys: bytes, num_keys: int, infos: bytes = b"", data: int = 0
) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + infos
    return start + bytes(-len(start) % 32 + data)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "magic needs 4 bytes"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 0x1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version 0x3000000 is not supported"),
        (header(1 << 60, b"", 0), "header claims"),
        (header(0, b"", 1 << 60), "header claims"),
        (header(0, struct.pack("<Q", 1 << 62), 1), "metadata key claims"),
        (header(0, text(b"\xff\xff") + struct.pack("<I", 4) + bytes(4), 1), "is not UTF-8"),
        (header(0, text(b"k") + struct.pack("<I", 99), 1), "metadata 'k' has unknown type 99"),
        (header(0, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 59), 1), "metadata 'k' needs"),
        (header(0, text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 59), 1), "metadata 'k' needs"),
        (header(0, text(b"k") + struct.pack("<IIQ", 9, 9, 1), 1), "unsupported type 9"),
        (header(0, (text(b"k") + struct.pack("<II", 4, 1)) * 2, 2), "'k' occurs twice"),
        (header(1, b"", 0, info(b"t", [], 0, 0)), "'t' has 0 dimensions"),
        (header(1, b"", 0, info(b"t", [1] * 5, 0, 0)), "'t' has 5 dimensions"),
        (header(1, b"", 0, info(b"t", [0], 0, 0)), "'t' has shape (0,)"),
        (header(1, b"", 0, info(b"t", [1 << 63, 1 << 63], 0, 0)), "'t' ends at byte"),
        (header(1, b"", 0, info(b"t", [33], 8, 0), 64), "'t' has rows of 33, not a multiple"),
        (header(1, b"", 0, info(b"t", [8], 0, 4), 64), "'t' starts at 4, not a multiple"),
        (header(1, b"", 0, info(b"t", [8], 0, 64), 64), "'t' ends at byte"),
        (header(2, b"", 0, info(b"t", [8], 0, 0) * 2, 64), "'t' occurs twice"),
        (
            header(2, b"", 0, info(b"t", [16], 0, 0) + info(b"u", [8], 0, 32), 64),
            "'u' overlaps tensor 't'",
        ),
        (header(0, b"", 0), "general.architecture is missing"),
    ],
)
def test_lying_headers(tmp_path, content, expected):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert expected in refused(path)


def use_everything(path) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.identity()
    for name in checkpoint.tensor_names():
        checkpoint.matrix(MatrixSource(name, (16, 16)), torch.float32)


def with_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(65 + i) for i in range(31)] + ["DE"])
    writer.add_token_types([1] * 32)
    writer.add_token_merges(["D E"])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_corruption_raises_nothing_but_checkpoint_errors(tiny, data):
    source = tiny.directory / "source.gguf"
    if not source.exists():
        tiny.write_gguf(with_tokenizer).rename(source)
        assert Tokenizer.from_checkpoint(source).encode("DEF") == [31, 5]
    content = bytearray(source.read_bytes())
    header_bytes = min(tensor.offset for tensor in read_gguf(source).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_bytes - 1))
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tiny.directory / "corrupt.gguf"
    path.write_bytes(content)
    for use in (use_everything, Tokenizer.from_checkpoint):
        with contextlib.suppress(CheckpointError):
            use(path)


@pytest.mark.model
def test_the_real_model(model_path):
    checkpoint = open_checkpoint(model_path)
    config = checkpoint.config
    attention = config.attention
    assert (config.num_layers, attention.num_heads, attention.num_kv_heads) == (30, 9, 3)
    assert (attention.head_dim, config.vocab_size) == (64, 49152)
    assert config.layers[0].rope.theta == 100000.0
    assert config.tie_word_embeddings
    assert config.eos_token_ids == {2}
    assert len(checkpoint.tensor_names()) == 272
    assert len(checkpoint.identity()) == 32


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_equals_the_gguf_library(model_path):
    """Names and values of one layer and of what is outside of layers; what transformers makes of
    the whole is compared end to end.
    """
    checkpoint = open_checkpoint(model_path)
    for theirs in gguf.GGUFReader(model_path).tensors:
        name = hf_name(theirs.name)
        if name.startswith("model.layers.") and not name.startswith("model.layers.7."):
            continue
        expected = gguf.dequantize(theirs.data, theirs.tensor_type)
        source = TensorSource(name, expected.shape)
        ours = checkpoint.tensor(source, torch.float32).numpy()
        heads = 9 if "q_proj" in name else 3 if "k_proj" in name else 0
        assert np.array_equal(permute(name, ours, heads), expected), name
