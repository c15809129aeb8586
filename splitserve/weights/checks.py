"""What readers of quantised matrices check alike. Never imports torch."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from splitserve.errors import CheckpointError
from splitserve.weights.arrays import Floats, grid_of
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers, StoredTensor

FLOAT_TYPES: Final = ("BF16", "F16", "F32")


def held_bytes(bits: int, group_size: int) -> float:
    """Bytes of memory a weight: its code and its part of a group's 16-bit scale and zero."""
    return bits / 8 + 4 / group_size


def check_groups(stored: StoredTensor, columns: int, group_size: int) -> None:
    """Raises `CheckpointError` unless groups of that size divide the columns."""
    if columns % group_size:
        raise stored.error(
            f"is quantised in groups of {group_size}, which do not divide its {columns} columns"
        )


def check_is_no_stack(headers: Headers, source: MatrixSource) -> None:
    """Raises `CheckpointError` for one of a stack of matrices, which these formats do not have."""
    if source.stack:
        raise CheckpointError(
            f"{headers.path}: tensor {source.name!r} is a stack of {source.stack}, expected plain "
            "numbers: stacks are not read in this quantisation"
        )


def checked_finite(values: Floats, stored: StoredTensor) -> Floats:
    """The values read of a tensor. One that is no number would spoil every answer."""
    if not np.isfinite(values).all():
        raise stored.error("has numbers that are not finite")
    return values


def read_vector(stored: StoredTensor) -> NDArray[np.int64]:
    """A vector of I32 or I64."""
    data = grid_of(stored).read()
    return data.view("<i4" if stored.dtype == "I32" else "<i8").reshape(-1).astype(np.int64)


def read_group_of_columns(stored: StoredTensor | None, group_size: int) -> NDArray[np.intp] | None:
    """Each column's group, None where there is no such tensor or the groups are in order."""
    if stored is None:
        return None
    group = read_vector(stored)
    count = len(group) // group_size
    if np.array_equal(group, np.arange(len(group)) // group_size) or (group == -1).all():
        return None
    inside = group.min() >= 0 and group.max() < count
    if not inside or (np.bincount(group, minlength=count) != group_size).any():
        raise stored.error(f"does not put {group_size} columns in each of {count} groups")
    return group.astype(np.intp)
