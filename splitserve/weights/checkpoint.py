"""Opens a checkpoint, whatever its format, under Hugging Face's names.

Importing this needs no torch; only `Checkpoint.tensor` does. So the router can read a model's
shape, tokenizer and chat template where no torch is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from splitserve.errors import CheckpointError
from splitserve.models.config import ModelConfig
from splitserve.weights.gguf_checkpoint import GgufCheckpoint
from splitserve.weights.gguf_config import read_gguf_config
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.hf_checkpoint import PICKLE_SUFFIXES, HuggingFaceCheckpoint
from splitserve.weights.hf_config import read_hf_config

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """A model's weights at rest. Nothing is read until asked for; safe to use from threads."""

    @property
    def path(self) -> Path:
        """The directory or the file."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the format says besides: config.json's object, or GGUF's keys and values."""

    def tensor_names(self) -> Sequence[str]:
        """Every tensor in Hugging Face's Llama names, sorted."""

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One tensor in host memory, contiguous, converted to `dtype`.

        Query and key projections are in the order that rotate-half rotary embedding needs.
        Raises `CheckpointError` if there is no such tensor or its shape is not `shape`.
        """

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises what `tensor` would, as far as the headers tell. Needs no torch."""

    def identity(self) -> bytes:
        """32 bytes that name the weights, equal on every host that has the same files."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face directory (safetensors) or a .gguf file and checks its headers.

    Raises `CheckpointError`, one line that names file and tensor. Formats that carry code
    (pickles: .bin, .pt, .pth) are never opened.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: pickled weights can run code and are never opened; convert to safetensors"
        )
    raise CheckpointError(f"{path}: not a model; give a Hugging Face directory or a .gguf file")


def read_config(path: str | Path) -> ModelConfig:
    """A model's shape alone. Needs no weights for a directory. Raises `CheckpointError`."""
    path = Path(path)
    return read_hf_config(path) if path.is_dir() else read_gguf_config(read_gguf(path))
