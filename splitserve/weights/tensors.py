"""Reads stored tensors into torch. The one file of this package that imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from splitserve.errors import CheckpointError
from splitserve.weights.stored import StoredTensor

_PLAIN: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_tensor(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in host memory, contiguous, converted to `dtype`; quantised ones dequantised.

    Rounds once, from the stored (or dequantised fp32) value. Raises `CheckpointError` for a stored
    type that holds no weights, and if the file cannot be read.
    """
    stored.check_is_weights()
    if stored.dtype in _PLAIN:
        tensor = _read_bytes(stored).view(_PLAIN[stored.dtype]).reshape(stored.shape)
        return tensor.to(dtype)
    return _dequantize(stored).to(dtype)


def undo_rope_permutation(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """From llama.cpp's order of a head's rows (pairs adjacent) to Hugging Face's (halves).

    llama.cpp's converter permutes Llama's query and key projections so that its rotary embedding
    may turn neighbours. `tensor` is (num_heads * head_dim, ...).
    """
    rows = tensor.shape[0]
    pairs = tensor.reshape(num_heads, rows // num_heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _read_bytes(stored: StoredTensor) -> torch.Tensor:
    data = torch.empty(stored.size_bytes, dtype=torch.uint8)
    if stored.size_bytes:
        stored.read_into(memoryview(data.numpy().data))
    return data


def _dequantize(stored: StoredTensor) -> torch.Tensor:
    try:
        import gguf
    except ImportError as exc:
        raise CheckpointError(
            f"{stored.file}: needs the gguf package; pip install splitserve[engine]"
        ) from exc
    rows = math.prod(stored.shape[:-1])
    blocks = _read_bytes(stored).numpy().reshape(rows, -1)
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[stored.dtype])
    return torch.from_numpy(values).reshape(stored.shape)
