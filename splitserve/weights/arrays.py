"""Numbers in stored bytes as arrays. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from splitserve.weights.grid import Bytes, Grid
from splitserve.weights.stored import StoredTensor

ITEM_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1,
    "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
}  # fmt: skip
_FLOATS: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8]
Words: TypeAlias = NDArray[np.uint32]


def grid_of(stored: StoredTensor, index: int = 0) -> Grid:
    """A plain tensor of two dimensions, or one of a stack of such; a vector is a column."""
    rows, width = {0: (1, 1), 1: (*stored.shape, 1)}.get(len(stored.shape), stored.shape[-2:])
    return Grid(stored, rows, width, ITEM_BYTES[stored.dtype], index)


def to_floats(data: Bytes, dtype: str) -> Floats:
    """Bytes of F64, F32, F16 or BF16 as fp32, which holds all but F64 exactly."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    # Whatever a file holds is a number of some kind; what is too large becomes infinite.
    with np.errstate(all="ignore"):
        return data.view(_FLOATS[dtype]).astype(np.float32, copy=False)


def to_words(data: Bytes) -> Words:
    """(rows, bytes) as little-endian 32-bit words."""
    return data.view("<u4")


def unpack_rows(words: Words, bits: int, skip: int, count: int) -> NDArray[np.uint8]:
    """Codes of 4 or 8 bits packed along rows, lowest bits first: `count` a row, after `skip`."""
    data = words.view(np.uint8)
    if bits == 4:
        codes = np.empty((*data.shape, 2), np.uint8)
        np.bitwise_and(data, 15, out=codes[:, :, 0])
        np.right_shift(data, 4, out=codes[:, :, 1])
        data = codes.reshape(data.shape[0], -1)
    return data[:, skip : skip + count]


def numbers_of(spans: Sequence[range]) -> NDArray[np.intp]:
    """The numbers of ranges, one after another."""
    return np.concatenate([np.arange(span.start, span.stop, span.step) for span in spans])


def positions_in(spans: Sequence[range], words: Sequence[range], size: int) -> NDArray[np.intp]:
    """Where the numbers of `spans` are in what `words`, which cover them, hold: `size` a word."""
    before, positions = 0, []
    for span, covers in zip(spans, words, strict=True):
        positions.append(numbers_of([span]) - (covers.start - before) * size)
        before += len(covers)
    return np.concatenate(positions)


def groups_of(columns: range, group_size: int) -> tuple[int, NDArray[np.intp]]:
    """How columns that are a part of a matrix are grouped: `size, groups`.

    A part that cuts groups gets smaller groups of one size, several of which are of the same
    stored group; `groups` has the stored group of each.
    """
    first, last = columns.start // group_size, columns[-1] // group_size
    if first == last:
        return len(columns), np.array([first])
    size = gcd(group_size, columns.start, columns.stop)
    return size, np.arange(columns.start, columns.stop, size) // group_size
