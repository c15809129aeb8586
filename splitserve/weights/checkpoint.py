"""Opens a checkpoint, whatever its format, under Hugging Face's names.

Importing this needs no torch; only `Checkpoint.tensor` and `matrix` do. So the router can read a
model's shape, tokenizer and chat template where no torch is installed.
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
from splitserve.weights.source import MatrixSource, TensorSource

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight


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
        """Every tensor in Hugging Face's names, sorted."""

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        """A vector or a table, `source.read_shape`, contiguous, on the CPU, in `dtype`.

        Only the rows that are taken are read. Raises `CheckpointError`, which names the tensor
        and what was expected of it.
        """

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> Weight:
        """A projection, `source.read_shape`, contiguous, on the CPU.

        In `dtype`, or quantised where it is stored so. The rest of the matrix is not kept, nor
        read where it is cheaper not to. Query and key projections are in the order that
        rotate-half rotary embedding needs. Raises like `tensor`.
        """

    def check_tensor(self, source: TensorSource) -> None:
        """Raises what `tensor` would, as far as the headers tell. Needs no torch."""

    def check_matrix(self, source: MatrixSource) -> None:
        """Raises what `matrix` would, as far as the headers tell. Needs no torch."""

    def weight_bytes(self, source: MatrixSource) -> float | None:
        """About what one weight of a matrix that is stored quantised takes in memory, None for
        plain numbers. Raises like `check_matrix`. Needs no torch.
        """

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
