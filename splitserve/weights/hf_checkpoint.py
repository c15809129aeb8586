"""A Hugging Face directory: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from splitserve.errors import CheckpointError
from splitserve.fields import Fields, read_json_object
from splitserve.models.config import ModelConfig
from splitserve.models.names import Names
from splitserve.weights.dense import find_dense_tensor, read_dense_tensor
from splitserve.weights.hf_config import read_hf_config
from splitserve.weights.hf_matrix import find_matrix
from splitserve.weights.identity import weights_identity
from splitserve.weights.quantization import read_quantization
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """See `Checkpoint`. The constructor checks the config and every shard's header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_hf_config(path)
        self.metadata: Mapping[str, object] = read_json_object(path / "config.json")
        self._quantization = read_quantization(path)
        self._headers = Headers(path, _under_base(config.names, _read_headers(path)))
        self.config = _tied_as_stored(config, self._headers)

    def tensor_names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._headers.tensors)

    def stored_tensors(self) -> Mapping[str, StoredTensor]:
        """Where every tensor lies, by name: for whoever copies them as they are."""
        return self._headers.tensors

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        return read_dense_tensor(find_dense_tensor(self._headers, source), source, dtype)

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> Weight:
        """See `Checkpoint.matrix`."""
        return find_matrix(self._headers, self._quantization, source).read(dtype)

    def check_tensor(self, source: TensorSource) -> None:
        """See `Checkpoint.check_tensor`."""
        find_dense_tensor(self._headers, source)

    def check_matrix(self, source: MatrixSource) -> None:
        """See `Checkpoint.check_matrix`."""
        find_matrix(self._headers, self._quantization, source)

    def weight_bytes(self, source: MatrixSource) -> float | None:
        """See `Checkpoint.weight_bytes`."""
        return find_matrix(self._headers, self._quantization, source).weight_bytes

    def identity(self) -> bytes:
        """See `Checkpoint.identity`."""
        tensors = self._headers.tensors.values()
        try:
            sizes = [file.stat().st_size for file in {each.file for each in tensors}]
        except OSError as exc:
            raise CheckpointError(f"{exc.filename}: cannot be read: {exc.strerror}") from exc
        return weights_identity(self.config, tensors, sizes, self._quantization)


def _tied_as_stored(config: ModelConfig, headers: Headers) -> ModelConfig:
    """A config that ties the unembedding to the embedding is wrong, and Hugging Face does not
    follow it, where both are stored and differ.
    """
    names = config.names
    embedding = headers.tensors.get(f"{names.embedding}.weight")
    unembedding = headers.tensors.get(f"{names.unembedding}.weight")
    if not config.tie_word_embeddings or embedding is None or unembedding is None:
        return config
    alike = (embedding.dtype, embedding.shape) == (unembedding.dtype, unembedding.shape)
    if alike and _samples(embedding) == _samples(unembedding):
        return config
    return replace(config, tie_word_embeddings=False)


def _samples(tensor: StoredTensor) -> bytes:
    """Bytes from all over a tensor: two that are equal there are taken for equal."""
    size = min(_SAMPLE_BYTES, tensor.size_bytes)
    samples = bytearray(_NUM_SAMPLES * size)
    with tensor.reading() as read_into:
        for index in range(_NUM_SAMPLES):
            start = (tensor.size_bytes - size) * index // (_NUM_SAMPLES - 1)
            read_into(memoryview(samples)[index * size : (index + 1) * size], start)
    return bytes(samples)


def _under_base(names: Names, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Whole names for what was saved from the layers alone, as GPT-2 and BLOOM were."""
    if any(name.startswith(names.base) for name in tensors):
        return tensors
    head = f"{names.unembedding}."
    return {
        name if name.startswith(head) else names.base + name: tensor
        for name, tensor in tensors.items()
    }


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    index = directory / _INDEX
    if index.is_file():
        return _read_sharded(index)
    single = directory / _SINGLE
    if single.is_file():
        return read_safetensors(single)
    if any(each.suffix in PICKLE_SUFFIXES for each in directory.iterdir()):
        raise CheckpointError(
            f"{directory}: has only pickled weights, which can run code and are never opened; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{directory}: has neither {_SINGLE} nor {_INDEX}")


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = Fields.from_json_file(index).nested("weight_map")
    shard_of = {name: weight_map.text(name) for name in weight_map.names()}
    shards = {file: _read_shard(index, file) for file in sorted(set(shard_of.values()))}
    tensors = {}
    for name, file in shard_of.items():
        if name not in shards[file]:
            raise CheckpointError(
                f"{index.parent / file}: tensor {name!r} is missing, though {_INDEX} puts it there"
            )
        tensors[name] = shards[file][name]
    return tensors


def _read_shard(index: Path, file: str) -> dict[str, StoredTensor]:
    # A shard is a plain name: an index must not reach files outside its directory.
    if file != Path(file).name or not file.endswith(".safetensors"):
        raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file")
    path = index.parent / file
    if not path.is_file():
        raise CheckpointError(f"{path}: shard is missing, though {_INDEX} names it")
    return read_safetensors(path)
