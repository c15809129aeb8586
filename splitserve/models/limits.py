"""Checks of numbers that come from files. Never imports torch."""

from __future__ import annotations

import math
from typing import Final

from splitserve.errors import CheckpointError

# So that a base or a factor and what is divided by it are numbers in fp32, too.
_MOST_FACTOR: Final = 1e18
# The largest fp16.
_MOST_HALF: Final = 65504.0


def check_count(name: str, value: int, most: int) -> None:
    """Raises `CheckpointError` unless 1 <= value <= most."""
    if not 1 <= value <= most:
        raise CheckpointError(f"{name} is {value}, must be 1 to {most}")


def check_positive(name: str, value: float) -> None:
    """Raises `CheckpointError` unless the value is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{name} is {value}, must be a positive number")


def check_bound(name: str, value: float) -> None:
    """Raises `CheckpointError` unless the value is above 0 and a number in 16 bits, too."""
    check_positive(name, value)
    if value > _MOST_HALF:
        raise CheckpointError(f"{name} is {value}, must be at most {_MOST_HALF:.0f}")


def check_at_least_one(name: str, value: float) -> None:
    """Raises `CheckpointError` unless 1 <= value <= 1e18."""
    if not 1 <= value <= _MOST_FACTOR:
        raise CheckpointError(f"{name} is {value}, must be 1 to {_MOST_FACTOR:.0e}")
