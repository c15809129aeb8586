"""Tensors as a file stores them, before any is read. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from splitserve.errors import CheckpointError

PLAIN_TYPES: Final = frozenset({"F64", "F32", "F16", "BF16"})

ReadInto: TypeAlias = Callable[[memoryview, int], None]
"""`read_into(out, start)` fills `out` with a tensor's bytes from byte `start` of it on."""


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

    @contextmanager
    def reading(self) -> Iterator[ReadInto]:
        """Opens the file once for many reads. Reads, not maps: no fault if the file shrinks."""
        try:
            with self.file.open("rb", buffering=0) as file:
                descriptor = file.fileno()
                yield lambda out, start: _read_exactly(descriptor, out, self.offset + start)
        except (OSError, EOFError) as exc:
            raise self.error(f"cannot be read: {exc}") from exc

    def read_into(self, out: memoryview, start: int = 0) -> None:
        """Fills `out` with the bytes from `start` on."""
        with self.reading() as read_into:
            read_into(out, start)


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint by name, and the path that errors name."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def find(
        self, name: str, *shapes: tuple[int, ...], types: Collection[str] = ()
    ) -> StoredTensor:
        """The named tensor, which must have one of the shapes and, if given, of the types."""
        stored = self.tensors.get(name)
        expected = " or ".join(map(str, shapes))
        if stored is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing, the model needs it of shape {expected}"
            )
        if types and stored.dtype not in types:
            raise stored.error(f"is of type {stored.dtype}, expected {' or '.join(sorted(types))}")
        if stored.shape not in shapes:
            raise stored.error(f"has shape {stored.shape}, the model needs {expected}")
        return stored


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


def _read_exactly(descriptor: int, out: memoryview, offset: int) -> None:
    done = 0
    while done < len(out):
        # One read moves at most 2 GiB on Linux.
        count = os.preadv(descriptor, [out[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise EOFError(f"the file ended {len(out) - done} bytes early")
        done += count
