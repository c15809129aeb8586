"""Writes a quantised copy of a Hugging Face checkpoint."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from splitserve.errors import CheckpointError
from splitserve.fields import read_json_object
from splitserve.weights.compressed_writer import CompressedConfig, stored_tensors
from splitserve.weights.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import QuantizedMatrix

_CONFIG: Final = "config.json"
_QUANTIZATION: Final = "quantization_config"
NOTES: Final = "splitserve"
"""The object in config.json that only this project reads."""
_INDEX: Final = "model.safetensors.index.json"
_COPIED_SUFFIXES: Final = frozenset({".json", ".txt", ".model", ".jinja"})
_COPIED_NAMES: Final = frozenset({"LICENSE", "NOTICE"})
# What these say is true of the plain weights only.
_NOT_COPIED: Final = frozenset({_CONFIG, _INDEX, "hf_quant_config.json", "quantize_config.json"})
_MAX_SHARD_BYTES: Final = 4 << 30


class CheckpointWriter:
    """A directory in compressed-tensors' format, written a tensor at a time.

    As a context manager: there is nothing at `directory` until the block ends without an error,
    then all of it is there at once. `model` is the directory whose config, tokenizer and chat
    template are taken over. Raises `CheckpointError` if that has no config.json, if `directory`
    exists, and for what the disk refuses.
    """

    def __init__(
        self, directory: Path, model: Path, max_shard_bytes: int = _MAX_SHARD_BYTES
    ) -> None:
        if directory.exists():
            raise CheckpointError(f"{directory}: is there already; remove it or choose another")
        self._config = read_json_object(model / _CONFIG)
        self._directory = directory
        self._model = model
        self._max_shard_bytes = max_shard_bytes
        self._partial = directory.with_name(f".{directory.name}.partial-{secrets.token_hex(4)}")
        self._quantization = CompressedConfig()
        self._notes: dict[str, object] = {}
        self._shards: list[list[str]] = []
        self._writer: SafetensorsWriter | None = None
        self._size_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        try:
            self._partial.mkdir(parents=True)
        except OSError as exc:
            raise self._error(exc) from exc
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
            if error is None:
                self._finish()
        except OSError as exc:
            raise self._error(exc) from exc
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that stays as it is."""
        if name.endswith(".weight") and tensor.dim() == 2:
            self._quantization.add_plain(name.removesuffix(".weight"))
        self._add({name: tensor})

    def add_matrix(self, name: str, matrix: QuantizedMatrix) -> None:
        """A quantised matrix in place of the weight `name`.

        Raises `ValueError` for one that the format cannot hold, see `stored_tensors`.
        """
        module = name.removesuffix(".weight")
        if module == name:
            raise ValueError(f"{name}: only a module's weight can be written quantised")
        self._add(stored_tensors(module, matrix))
        self._quantization.add(module, matrix)

    def leave_plain(self, module: str) -> None:
        """A module without a weight of its own, which readers must not take for a quantised one."""
        self._quantization.add_plain(module)

    def note(self, key: str, value: object) -> None:
        """Something that only this project reads, under `splitserve` in config.json."""
        self._notes[key] = value

    def _add(self, tensors: dict[str, torch.Tensor]) -> None:
        """One module's tensors, all into one shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            writer = self._shard_for(tensors, size)
            for name, tensor in tensors.items():
                writer.add(name, tensor)
                self._shards[-1].append(name)
        except OSError as exc:
            raise self._error(exc) from exc
        self._size_bytes += size

    def _shard_for(self, tensors: dict[str, torch.Tensor], size: int) -> SafetensorsWriter:
        writer = self._writer
        if writer is not None:
            too_large = writer.size_bytes and writer.size_bytes + size > self._max_shard_bytes
            if not too_large and writer.has_room_for(tensors):
                return writer
            writer.close()
        self._writer = SafetensorsWriter(self._partial / f"{len(self._shards)}.safetensors")
        self._shards.append([])
        return self._writer

    def _finish(self) -> None:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            shard = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            (self._partial / f"{number}.safetensors").rename(self._partial / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._size_bytes}, "weight_map": weight_map}
        self._write_json(_INDEX, index)
        written = (_QUANTIZATION, NOTES)
        config = {key: each for key, each in self._config.items() if key not in written}
        if self._quantization:
            config[_QUANTIZATION] = self._quantization.to_json()
        if self._notes:
            config[NOTES] = self._notes
        self._write_json(_CONFIG, config)
        for file in self._model.iterdir():
            if _is_copied(file):
                shutil.copyfile(file, self._partial / file.name)
        self._partial.rename(self._directory)

    def _write_json(self, name: str, value: object) -> None:
        (self._partial / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _error(self, exc: OSError) -> CheckpointError:
        return CheckpointError(f"{self._directory}: cannot be written: {exc.strerror or exc}")


def _is_copied(file: Path) -> bool:
    if file.name in _NOT_COPIED or not file.is_file():
        return False
    return file.suffix in _COPIED_SUFFIXES or file.name in _COPIED_NAMES
