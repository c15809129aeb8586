"""What a product's code is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.quant.vnni.emitter import FloatKind

BLOCKS = 2
"""Blocks that are computed together: 32 output rows."""
TILES = (6, 4, 2, 1)
"""How many input rows share one reading of the codes; more would not fit into the registers."""

Codes = Literal["int8", "int4", "fp8"]
Inputs = Literal["wide", "rows", "fixed", "plain"]
"""16 bits; 8 bits with a step for each row; 8 bits with one fixed step; bf16 for fp8 codes."""


@dataclass(frozen=True)
class Variant:
    """Without `zeros`, all codes' zero is `1 << (bits - 1)`.

    `group` is the columns of a group where that is few, so that loops unroll, 0 where it is many.
    """

    codes: Codes
    scales: FloatKind
    zeros: FloatKind | None
    group: int
    inputs: Inputs

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.codes == "int4" else 8

    @property
    def planes(self) -> int:
        """Bytes of an input in scratch memory or, for bf16, of the input itself."""
        return 2 if self.inputs in ("wide", "plain") else 1

    @property
    def input_most(self) -> float:
        """The largest fixed-point input."""
        return 127.0 * 256 if self.planes == 2 else 127.0


PLAN_FIELDS = ("codes", "scales", "zeros", "bias", "groups", "group", "tiles", "width", "step")
"""What `product` knows of a matrix: numbers of 64 bits, the last a float in its low half."""


def scratch_bytes(variant: Variant, rows: int, columns: int, groups: int) -> int:
    """Planes, sums and steps of that many input rows."""
    if variant.inputs == "plain":
        return 0
    return rows * (variant.planes * columns + 4 * groups + 4)


@dataclass(frozen=True)
class OmpCalls:
    """Addresses in torch's own OpenMP library, so that there is one pool of threads."""

    parallel: int
    thread_number: int
    thread_count: int
