"""A strict reader of safetensors headers, which need no torch and no mapping of the file.

Format: eight bytes of header length, that many bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from splitserve.errors import CheckpointError
from splitserve.fields import parse_json_object
from splitserve.weights.arrays import ITEM_BYTES
from splitserve.weights.stored import StoredTensor, check_extents

# The format's own cap.
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_NAME_CHARS: Final = 1024


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises `CheckpointError` unless the file is consistent."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: header claims {header_bytes} bytes, the file has {file_bytes}; "
                    "it is truncated or not a safetensors file"
                )
            header = parse_json_object(path, file.read(header_bytes))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    check_extents(tensors.values(), file_bytes)
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if len(name) > _MAX_NAME_CHARS:
        raise CheckpointError(
            f"{path}: tensor {name[:80]!r}... has a name of {len(name)} characters"
        )
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: tensor {name!r} is not described by an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    element_bytes = ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if element_bytes is None:
        raise CheckpointError(f"{path}: tensor {name!r} has unknown dtype {str(dtype)[:80]!r}")
    if not _is_counts(shape):
        raise CheckpointError(f"{path}: tensor {name!r} has a shape that is no list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has no valid data_offsets")
    start, end = offsets
    tensor = StoredTensor(name, path, dtype, tuple(shape), data_start + start, end - start)
    needed = math.prod(shape) * element_bytes
    if end - start != needed:
        raise tensor.error(
            f"of {dtype} and shape {tensor.shape} needs {needed} bytes, its offsets "
            f"span {end - start}"
        )
    return tensor


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
