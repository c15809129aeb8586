"""All cases of all families."""

from __future__ import annotations

import importlib

from .parity import Case

FAMILIES = ("announced", "code", "experts", "llama", "modern", "rope_scalings")
"""Modules `test_*` of this folder that name cases."""


def all_cases() -> list[Case]:
    """Those of this folder's modules."""
    found: list[Case] = []
    for name in FAMILIES:
        found += importlib.import_module(f".test_{name}", __package__).CASES
    return found
