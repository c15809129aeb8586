"""A strict reader of GGUF headers: every count, length and offset is checked before it is used.

The file is untrusted. Nothing is allocated because a header says so: lengths are first compared
with the bytes that are left in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import numpy as np

from splitserve.errors import CheckpointError
from splitserve.weights.arrays import ITEM_BYTES
from splitserve.weights.ggml_blocks import BLOCK_TYPES
from splitserve.weights.stored import StoredTensor, check_extents

MetadataValue: TypeAlias = bool | int | float | str | list[int] | list[float] | list[str]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_HEADER_BYTES: Final = 1 << 29
_MAX_KEYS: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 17
_MAX_NAME_BYTES: Final = 1 << 10
_MAX_ITEM_BYTES: Final = 1 << 16
_READ_BYTES: Final = 1 << 20

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[Mapping[int, str]] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

_TENSOR_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip


@dataclass(frozen=True)
class GgufFile:
    """A checked header: the metadata by key and the tensors by GGUF's own names."""

    path: Path
    size_bytes: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, version 2 or 3, little-endian.

    Raises `CheckpointError` for anything that is not a whole and consistent file.
    """
    try:
        with path.open("rb") as file:
            return _read_header(path, _Cursor(path, file))
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc


def _read_header(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4, "magic") != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file")
    version = cursor.integer("<I", "version")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path}: GGUF version {version:#x} is not supported; convert it to version 3, "
            "little-endian"
        )
    num_tensors = cursor.integer("<Q", "tensor count")
    num_keys = cursor.integer("<Q", "metadata count")
    if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
        raise CheckpointError(
            f"{path}: header claims {num_tensors} tensors and {num_keys} metadata keys"
        )
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_keys):
        key = cursor.string("metadata key", _MAX_NAME_BYTES)
        if key in metadata:
            raise CheckpointError(f"{path}: metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, key)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = _alignment(path, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for info in infos:
        tensor = _place_tensor(path, info, data_start, alignment)
        if tensor.name in tensors:
            raise tensor.error("occurs twice")
        tensors[tensor.name] = tensor
    check_extents(tensors.values(), cursor.file_bytes)
    return GgufFile(path, cursor.file_bytes, metadata, tensors)


def _read_value(cursor: _Cursor, key: str) -> MetadataValue:
    what = f"metadata {key!r}"
    kind = cursor.integer("<I", what)
    if kind == _STRING:
        return cursor.string(what, _MAX_HEADER_BYTES)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {what} has unknown type {kind}")
    (value,) = _read_numbers(cursor, what, kind, 1)
    return bool(value) if kind == _BOOL else value


def _read_array(cursor: _Cursor, what: str) -> MetadataValue:
    kind = cursor.integer("<I", what)
    count = cursor.integer("<Q", what)
    if kind == _STRING:
        # Each string has a length of eight bytes, so a lying count fails here, unallocated.
        cursor.check_left(count * 8, what)
        return [cursor.string(what, _MAX_ITEM_BYTES) for _ in range(count)]
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {what} is an array of unsupported type {kind}")
    return _read_numbers(cursor, what, kind, count)


def _read_numbers(cursor: _Cursor, what: str, kind: int, count: int) -> list[int] | list[float]:
    dtype = np.dtype(_SCALARS[kind])
    numbers: list[int] | list[float] = np.frombuffer(
        cursor.take(count * dtype.itemsize, what), dtype=dtype
    ).tolist()
    return numbers


def _read_tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("tensor name", _MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    num_dims = cursor.integer("<I", what)
    if not 1 <= num_dims <= 4:
        raise CheckpointError(f"{cursor.path}: {what} has {num_dims} dimensions, must be 1 to 4")
    dims = tuple(cursor.integer("<Q", what) for _ in range(num_dims))
    return name, dims[::-1], cursor.integer("<I", what), cursor.integer("<Q", what)


def _place_tensor(
    path: Path, info: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int
) -> StoredTensor:
    name, shape, kind, offset = info
    if kind not in _TENSOR_TYPES:
        known = ", ".join(sorted(_TENSOR_TYPES.values()))
        raise CheckpointError(
            f"{path}: tensor {name!r} has type number {kind}, which is not supported; "
            f"supported: {known}"
        )
    dtype = _TENSOR_TYPES[kind]
    block_elements, block_bytes = _block(dtype)
    size_bytes = math.prod(shape) // block_elements * block_bytes
    tensor = StoredTensor(name, path, dtype, shape, data_start + offset, size_bytes)
    if min(shape) < 1:
        raise tensor.error(f"has shape {shape}")
    if shape[-1] % block_elements:
        raise tensor.error(f"has rows of {shape[-1]}, not a multiple of {dtype}'s {block_elements}")
    if offset % alignment:
        raise tensor.error(f"starts at {offset}, not a multiple of the alignment {alignment}")
    return tensor


def _block(dtype: str) -> tuple[int, int]:
    """Elements and bytes of a block; a plain number is a block of its own."""
    block = BLOCK_TYPES.get(dtype)
    return (block.elements, block.size_bytes) if block else (1, ITEM_BYTES[dtype])


def _alignment(path: Path, metadata: Mapping[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in {1 << power for power in range(3, 17)}:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, not a power of two")
    return alignment


class _Cursor:
    """Takes bytes from the front of a file, never more than the file has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file_bytes = file.seek(0, 2)
        self.position = 0
        self._file = file
        self._file.seek(0)
        self._buffer = b""
        self._buffer_start = 0

    def check_left(self, size: int, what: str) -> None:
        """Raises unless `size` more bytes are in the file and within the header's cap."""
        left = min(self.file_bytes, _MAX_HEADER_BYTES) - self.position
        if size > left:
            raise CheckpointError(
                f"{self.path}: {what} needs {size} bytes at byte {self.position}, but {left} are "
                "left; the file is truncated or its header is wrong"
            )

    def take(self, size: int, what: str) -> bytes:
        self.check_left(size, what)
        start = self.position - self._buffer_start
        if start + size > len(self._buffer):
            self._buffer = self._buffer[start:] + self._file.read(max(size, _READ_BYTES))
            self._buffer_start, start = self.position, 0
        taken = self._buffer[start : start + size]
        if len(taken) < size:
            raise CheckpointError(f"{self.path}: {what} is cut short; the file changed under us")
        self.position += size
        return taken

    def integer(self, layout: str, what: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def string(self, what: str, max_bytes: int) -> str:
        size = self.integer("<Q", what)
        if size > max_bytes:
            raise CheckpointError(f"{self.path}: {what} claims {size} bytes, at most {max_bytes}")
        try:
            return self.take(size, what).decode()
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8") from exc
