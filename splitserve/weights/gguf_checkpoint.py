"""A GGUF file seen as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from splitserve.weights.dense import DenseMatrix, check_is_plain, read_dense_tensor
from splitserve.weights.ggml import BlockMatrix, read_block_tensor
from splitserve.weights.ggml_blocks import BLOCK_TYPES
from splitserve.weights.gguf_config import read_gguf_config
from splitserve.weights.gguf_file import GgufFile, read_gguf
from splitserve.weights.gguf_names import ROPE_FACTORS, hf_name
from splitserve.weights.identity import weights_identity
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight


class GgufCheckpoint:
    """See `Checkpoint`. The constructor checks the header; the metadata is GGUF's own."""

    def __init__(self, path: Path) -> None:
        file = read_gguf(path)
        self.path = path
        self.config = read_gguf_config(file)
        self.metadata: Mapping[str, object] = file.metadata
        self._file_bytes = file.size_bytes
        self._headers = Headers(path, _by_hf_name(file))

    def tensor_names(self) -> list[str]:
        """Every tensor's Hugging Face name, sorted."""
        return sorted(self._headers.tensors)

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        stored = self._find_tensor(source)
        rows = self._stored_rows(source.name, source.rows, source.shape[0])
        source = replace(source, rows=rows)
        read = read_block_tensor if stored.dtype in BLOCK_TYPES else read_dense_tensor
        return read(stored, source, dtype)

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> Weight:
        """See `Checkpoint.matrix`."""
        return self._find_matrix(source).read(dtype)

    def check_tensor(self, source: TensorSource) -> None:
        """See `Checkpoint.check_tensor`."""
        self._find_tensor(source)

    def check_matrix(self, source: MatrixSource) -> None:
        """See `Checkpoint.check_matrix`."""
        self._find_matrix(source)

    def weight_bytes(self, source: MatrixSource) -> float | None:
        """See `Checkpoint.weight_bytes`."""
        return self._find_matrix(source).weight_bytes

    def identity(self) -> bytes:
        """See `Checkpoint.identity`."""
        return weights_identity(self.config, self._headers.tensors.values(), [self._file_bytes])

    def _find_tensor(self, source: TensorSource) -> StoredTensor:
        stored = self._headers.find(source.name, source.stored_shape)
        if stored.dtype not in BLOCK_TYPES or len(stored.shape) != 2:
            check_is_plain(stored)
        return stored

    def _find_matrix(self, source: MatrixSource) -> DenseMatrix | BlockMatrix:
        # llama.cpp's converter stores every projection as (out, in).
        source = replace(source, transposed=False)
        rows = self._stored_rows(source.name, source.rows, source.shape[0])
        stored = self._headers.find(source.name, source.stored_shape)
        if stored.dtype in BLOCK_TYPES:
            return BlockMatrix(stored, replace(source, rows=rows))
        return DenseMatrix.find(self._headers, replace(source, rows=rows))

    def _stored_rows(
        self, name: str, rows: tuple[range, ...] | None, height: int
    ) -> tuple[range, ...] | None:
        """Which rows of the file are the rows of the Hugging Face tensor, in that one's order.

        llama.cpp's converter permutes the query and key projections of its `llama` architecture,
        so that its rotary embedding may turn neighbours where Hugging Face's turns halves.
        """
        projected = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        if not projected or self.metadata.get("general.architecture") != "llama":
            return rows
        return tuple(unpermuted(rows or (range(height),), self.config.attention.head_dim))


def unpermuted(rows: Sequence[range], head_dim: int) -> list[range]:
    """Rows of heads whose halves are apart to where they are with the halves interleaved."""
    half = head_dim // 2
    taken = []
    for span in rows:
        for number in range(span.start // half, -(-span.stop // half)):
            head, second = divmod(number, 2)
            stored = range(head * head_dim + second, (head + 1) * head_dim, 2)
            first = number * half
            taken.append(stored[max(span.start - first, 0) : span.stop - first])
    return taken


def _by_hf_name(file: GgufFile) -> dict[str, StoredTensor]:
    tensors = {}
    for name, stored in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        renamed = hf_name(name)
        if renamed is None:
            # A tensor that is not understood would be left out of the arithmetic: wrong answers.
            raise stored.error("is not one that a Llama-family model has")
        tensors[renamed] = stored
    return tensors
