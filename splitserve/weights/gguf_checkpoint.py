"""A GGUF file seen as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from splitserve.weights.gguf_config import read_gguf_config
from splitserve.weights.gguf_file import GgufFile, read_gguf
from splitserve.weights.gguf_names import ROPE_FACTORS, hf_name
from splitserve.weights.identity import weights_identity
from splitserve.weights.stored import StoredTensor, find_tensor

if TYPE_CHECKING:
    import torch


class GgufCheckpoint:
    """See `Checkpoint`. The constructor checks the header; the metadata is GGUF's own."""

    def __init__(self, path: Path) -> None:
        file = read_gguf(path)
        self.path = path
        self.config = read_gguf_config(file)
        self.metadata: Mapping[str, object] = file.metadata
        self._file_bytes = file.size_bytes
        self._tensors = _by_hf_name(file)

    def tensor_names(self) -> list[str]:
        """Every tensor's Hugging Face name, sorted."""
        return sorted(self._tensors)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`."""
        # Here and not above: the router opens checkpoints where no torch is installed.
        from splitserve.weights.tensors import read_tensor, undo_rope_permutation

        tensor = read_tensor(find_tensor(self.path, self._tensors, name, shape), dtype)
        heads = self._permuted_heads(name)
        return undo_rope_permutation(tensor, heads) if heads else tensor

    def check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """See `Checkpoint.check_tensor`."""
        find_tensor(self.path, self._tensors, name, shape).check_is_weights()

    def identity(self) -> bytes:
        """See `Checkpoint.identity`."""
        return weights_identity(self.config, self._tensors.values(), [self._file_bytes])

    def _permuted_heads(self, name: str) -> int:
        """How many heads llama.cpp permuted the rows of, 0 if it left the tensor alone."""
        if self.config.architecture != "LlamaForCausalLM":
            return 0
        if ".self_attn.q_proj." in name:
            return self.config.num_heads
        if ".self_attn.k_proj." in name:
            return self.config.num_kv_heads
        return 0


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
