"""Tensors as a file stores them, before any is read. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitserve.errors import CheckpointError

PLAIN_TYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})
GGML_TYPES: Final = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"})


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `shape` is in torch's order, outermost dimension first.

    `dtype` is the file format's own name, such as BF16 or Q4_K. `offset` counts from the start of
    the file; both it and `size_bytes` have been checked against the file's size.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def error(self, what: str) -> CheckpointError:
        """An error about this tensor that names it and its file."""
        return CheckpointError(f"{self.file}: tensor {self.name!r} {what}")

    def check_is_weights(self) -> None:
        """Raises `CheckpointError` for a type that holds no weights, or none that is known."""
        if self.dtype not in PLAIN_TYPES | GGML_TYPES:
            raise self.error(f"is of type {self.dtype}, which holds no plain weights")

    def read_into(self, out: memoryview, start: int = 0) -> None:
        """Fills `out` with the bytes from `start` on. Reads, not maps: no fault if it shrinks."""
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                _read_exactly(file.fileno(), out)
        except (OSError, EOFError) as exc:
            raise self.error(f"cannot be read: {exc}") from exc


def check_extents(tensors: Iterable[StoredTensor], file_bytes: int) -> None:
    """Every tensor lies inside its file and no two share a byte. All are of one file."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size_bytes)):
        if tensor.offset + tensor.size_bytes > file_bytes:
            raise tensor.error(
                f"ends at byte {tensor.offset + tensor.size_bytes}, past the end of the file "
                f"({file_bytes} bytes); the file is truncated or its header is wrong"
            )
        if tensor.offset < end:
            raise tensor.error(f"overlaps tensor {before!r}")
        end, before = tensor.offset + tensor.size_bytes, tensor.name


def find_tensor(
    path: Path, tensors: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]
) -> StoredTensor:
    """The named tensor, if it is there and has the shape that is expected."""
    stored = tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{path}: tensor {name!r} is missing")
    if stored.shape != tuple(shape):
        raise stored.error(f"has shape {stored.shape}, the model needs {tuple(shape)}")
    return stored


def _read_exactly(descriptor: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        # One read moves at most 2 GiB on Linux.
        count = os.readv(descriptor, [out[done : done + (1 << 30)]])
        if count == 0:
            raise EOFError(f"the file ended {len(out) - done} bytes early")
        done += count
