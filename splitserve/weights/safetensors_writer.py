"""Writes safetensors files a tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Final

import torch

# The header comes first and its size is known last: this much is kept free and filled with
# spaces, which the format allows. It holds about a thousand tensors.
_HEADER_BYTES: Final = 1 << 17
_DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32",
    torch.int64: "I64",
}  # fmt: skip


class SafetensorsWriter:
    """One file. Nothing but the tensor at hand is held in memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.seek(8 + _HEADER_BYTES)
        self._entries: dict[str, dict[str, object]] = {}
        # Of the JSON text, less than a byte a tensor too much.
        self._header_bytes = 2
        self.size_bytes = 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def has_room_for(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the header can hold these, too."""
        # Offsets may grow by a few digits from one to the next.
        added = sum(len(_text(self._entry(name, each))) + 32 for name, each in tensors.items())
        return self._header_bytes + added <= _HEADER_BYTES

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor, which must be on the CPU. Raises `OSError`, `ValueError` if the header
        cannot hold it.
        """
        entry = self._entry(name, tensor)
        self._header_bytes += len(_text(entry)) + 2
        if self._header_bytes > _HEADER_BYTES:
            raise ValueError(f"{name}: the header of this file is full")
        self._entries |= entry
        if tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(data.numpy().data)
        self.size_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes the header."""
        if self._file.closed:
            return
        with self._file as file:
            file.seek(0)
            file.write(_HEADER_BYTES.to_bytes(8, "little"))
            file.write(_text(self._entries).ljust(_HEADER_BYTES))

    def _entry(self, name: str, tensor: torch.Tensor) -> dict[str, dict[str, object]]:
        end = self.size_bytes + tensor.nbytes
        described: dict[str, object] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size_bytes, end],
        }
        return {name: described}


def _text(value: object) -> bytes:
    return json.dumps(value).encode()
