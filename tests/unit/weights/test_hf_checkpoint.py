from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from splitserve.errors import CheckpointError
from splitserve.weights import open_checkpoint
from splitserve.weights.source import MatrixSource, TensorSource


def refused(path) -> str:
    """The one line with which opening is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    return caught.value.message


def test_single_file(tiny):
    tiny.write_single()
    checkpoint = open_checkpoint(tiny.directory)
    assert list(checkpoint.tensor_names()) == sorted(tiny.tensors)
    for name, expected in tiny.tensors.items():
        assert torch.equal(
            checkpoint.tensor(TensorSource(name, expected.shape), torch.float32), expected
        )


def test_shards(tiny):
    tiny.write_sharded()
    checkpoint = open_checkpoint(str(tiny.directory))
    for name, expected in tiny.tensors.items():
        assert torch.equal(
            checkpoint.tensor(TensorSource(name, expected.shape), torch.float32), expected
        )


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted(tiny, stored, wanted):
    tiny.tensors = {name: tensor.to(stored) for name, tensor in tiny.tensors.items()}
    tiny.write_single()
    got = open_checkpoint(tiny.directory).matrix(MatrixSource("lm_head.weight", (32, 16)), wanted)
    assert got.dtype == wanted
    assert torch.equal(got, tiny.tensors["lm_head.weight"].to(wanted))


def test_integers_are_no_weights(tiny):
    tiny.tensors["model.norm.weight"] = torch.ones(16, dtype=torch.int32)
    tiny.write_single()
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is of type I32"):
        open_checkpoint(tiny.directory).tensor(
            TensorSource("model.norm.weight", (16,)), torch.float32
        )


def test_wrong_shape_and_missing_tensor(tiny):
    path = tiny.write_single()
    checkpoint = open_checkpoint(tiny.directory)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor(TensorSource("lm_head.weight", (16, 32)), torch.float32)
    assert caught.value.message == (
        f"{path}: tensor 'lm_head.weight' has shape (32, 16), the model needs (16, 32)"
    )
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.bias' is missing"):
        checkpoint.tensor(TensorSource("lm_head.bias", (32,)), torch.float32)


def test_missing_shard(tiny):
    tiny.write_sharded()
    (tiny.directory / "model-00002-of-00002.safetensors").unlink()
    message = refused(tiny.directory)
    assert "model-00002-of-00002.safetensors: shard is missing" in message


def test_index_names_a_tensor_that_its_shard_lacks(tiny):
    weight_map = tiny.write_sharded()
    tiny.write_index(weight_map | {"extra.weight": "model-00001-of-00002.safetensors"})
    message = refused(tiny.directory)
    assert "model-00001-of-00002.safetensors: tensor 'extra.weight' is missing" in message


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "pytorch_model.bin", "", "a/b.safetensors"]
)
def test_index_must_not_reach_elsewhere(tiny, shard):
    tiny.write_index({"lm_head.weight": shard})
    assert "is not the name of a safetensors file" in refused(tiny.directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tiny, name):
    (tiny.directory / name).write_bytes(b"\x80\x04.")
    assert "convert them to safetensors" in refused(tiny.directory)
    assert "convert to safetensors" in refused(tiny.directory / name)


def test_no_weights_and_no_directory(tiny):
    assert "has neither model.safetensors nor" in refused(tiny.directory)
    assert "no such file or directory" in refused(tiny.directory / "nowhere")
    assert "give a Hugging Face directory" in refused(tiny.directory / "config.json")
    (tiny.directory / "config.json").unlink()
    assert "config.json: cannot be read" in refused(tiny.directory)


def test_file_cut_short(tiny):
    path = tiny.write_single()
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated" in refused(tiny.directory)


def test_file_that_shrinks_after_it_was_opened(tiny):
    path = tiny.write_single()
    checkpoint = open_checkpoint(tiny.directory)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' cannot be read: the file end"
    ):
        checkpoint.tensor(TensorSource("model.norm.weight", (16,)), torch.float32)


def safetensors_bytes(header: object, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ((1 << 60).to_bytes(8, "little") + b"{}", "header claims"),
        (safetensors_bytes(b"[]", 0), "must hold one JSON object"),
        (safetensors_bytes(b"{", 0), "not valid JSON"),
        (safetensors_bytes(b"[" * 90_000, 0), "not valid JSON"),
        (safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}", 0), "not valid JSON"),
        (safetensors_bytes({"a": 3}, 0), "'a' is not described by an object"),
        (safetensors_bytes({"a": F32 | {"dtype": "F7"}}, 16), "'a' has unknown dtype 'F7'"),
        (safetensors_bytes({"a": F32 | {"dtype": []}}, 16), "'a' has unknown dtype"),
        (safetensors_bytes({"a": F32 | {"shape": [-2, -2]}}, 16), "'a' has a shape"),
        (safetensors_bytes({"a": F32 | {"shape": [2, True]}}, 16), "'a' has a shape"),
        (safetensors_bytes({"a": F32 | {"shape": 4}}, 16), "'a' has a shape"),
        (safetensors_bytes({"a": F32 | {"shape": [1 << 62, 4]}}, 16), "'a' of F32"),
        (safetensors_bytes({"a": F32 | {"data_offsets": [0]}}, 16), "no valid data_offsets"),
        (safetensors_bytes({"a": F32 | {"data_offsets": [16, 0]}}, 16), "'a' of F32"),
        (safetensors_bytes({"a": F32 | {"data_offsets": [0, 12]}}, 16), "'a' of F32"),
        (safetensors_bytes({"a": F32}, 15), "'a' ends at byte"),
        (
            safetensors_bytes({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}, 24),
            "'b' overlaps tensor 'a'",
        ),
    ],
)
def test_lying_headers(tiny, content, expected):
    (tiny.directory / "model.safetensors").write_bytes(content)
    assert expected in refused(tiny.directory)


def test_identity_names_the_content(tiny, tmp_path):
    tiny.write_single()
    first = open_checkpoint(tiny.directory).identity()
    assert len(first) == 32
    assert open_checkpoint(tiny.directory).identity() == first

    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        (copy / file).write_bytes((tiny.directory / file).read_bytes())
    assert open_checkpoint(copy).identity() == first

    tiny.write_config(rope_theta=500000.0)
    assert open_checkpoint(tiny.directory).identity() != first
    tiny.write_config()
    tiny.tensors["model.norm.weight"][3] += 1
    save_file(tiny.tensors, tiny.directory / "model.safetensors")
    assert open_checkpoint(tiny.directory).identity() != first


def test_metadata_is_the_config(tiny):
    tiny.write_config(model_type="llama")
    tiny.write_single()
    assert open_checkpoint(tiny.directory).metadata["model_type"] == "llama"


def test_identity_tells_how_codes_are_read(tiny):
    tiny.write_single()
    identities = set()
    for version in ("gptq", "gptq_v2"):
        method = {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": version}
        tiny.write_config(quantization_config=method)
        identities.add(open_checkpoint(tiny.directory).identity())
        assert open_checkpoint(tiny.directory).identity() in identities
    assert len(identities) == 2


def test_an_unknown_quantisation_is_refused(tiny):
    tiny.write_single()
    tiny.write_config(quantization_config={"quant_method": "squeeze"})
    assert "quantization_config.quant_method 'squeeze' is not supported" in refused(tiny.directory)


def test_opening_needs_no_torch(tiny):
    """Nor does checking, plain or quantised."""
    name = "model.layers.0.mlp.up_proj"
    del tiny.tensors[f"{name}.weight"]
    tiny.tensors |= {
        f"{name}.qweight": torch.zeros(2, 24, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(2, 3, dtype=torch.int32),
        f"{name}.scales": torch.ones(2, 24),
    }
    tiny.write_config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 8})
    tiny.write_single()
    program = f"""
import sys
from splitserve.weights import open_checkpoint
from splitserve.weights.source import MatrixSource, TensorSource
import splitserve.tokenizer, splitserve.chat, splitserve.models.rope
checkpoint = open_checkpoint({str(tiny.directory)!r})
checkpoint.identity()
checkpoint.check_tensor(TensorSource("model.norm.weight", (16,)))
checkpoint.check_matrix(MatrixSource("lm_head.weight", (32, 16)))
checkpoint.check_matrix(MatrixSource({name!r} + ".weight", (24, 16)))
print("torch" in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert out.stdout.strip() == "False"


def test_a_tied_unembedding_that_differs_is_not_tied(tiny):
    """As in Hugging Face's own loading."""
    tiny.write_config(tie_word_embeddings=True)
    tiny.write_single()
    assert not open_checkpoint(tiny.directory).config.tie_word_embeddings
    tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"].clone()
    tiny.write_single()
    assert open_checkpoint(tiny.directory).config.tie_word_embeddings
    del tiny.tensors["lm_head.weight"]
    tiny.write_single()
    assert open_checkpoint(tiny.directory).config.tie_word_embeddings
