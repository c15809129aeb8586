"""A Hugging Face directory: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from splitserve.errors import CheckpointError
from splitserve.weights.fields import Fields, read_json_object
from splitserve.weights.hf_config import read_hf_config
from splitserve.weights.identity import weights_identity
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.stored import StoredTensor, find_tensor

if TYPE_CHECKING:
    import torch

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """See `Checkpoint`. The constructor checks the config and every shard's header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_hf_config(path)
        self.metadata: Mapping[str, object] = read_json_object(path / "config.json")
        self._tensors = _read_headers(path)

    def tensor_names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._tensors)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        # Here and not above: the router opens checkpoints where no torch is installed.
        from splitserve.weights.tensors import read_tensor

        return read_tensor(find_tensor(self.path, self._tensors, name, shape), dtype)

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """See `Checkpoint.check_tensor`."""
        find_tensor(self.path, self._tensors, name, shape).check_is_weights()

    def identity(self) -> bytes:
        """See `Checkpoint.identity`."""
        try:
            sizes = [file.stat().st_size for file in {each.file for each in self._tensors.values()}]
        except OSError as exc:
            raise CheckpointError(f"{exc.filename}: cannot be read: {exc.strerror}") from exc
        return weights_identity(self.config, self._tensors.values(), sizes)


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
