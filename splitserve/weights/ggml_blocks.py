"""llama.cpp's blocks of quantised weights: `code * scale + minimum` a group. No torch needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from splitserve.weights.arrays import Codes, Floats
from splitserve.weights.grid import Bytes

Decoded: TypeAlias = tuple[Codes, Floats, Floats | None]
"""Codes (blocks, elements), scales (blocks, groups) and minima like scales, None for zeros."""


@dataclass(frozen=True)
class BlockType:
    """`elements` consecutive weights of a row in `size_bytes`, a scale for each `group_size`."""

    kind: Literal["int4", "int8"]
    elements: int
    size_bytes: int
    group_size: int
    decode: Callable[[Bytes], Decoded]
    """Takes (blocks, size_bytes)."""


def _q4_0(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 2:]) - np.int8(8), _halves(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return codes - np.int8(16), _halves(blocks[:, :2]), None


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> Decoded:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _halves(blocks[:, :2]), None


def _q4_k(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Decoded:
    # Byte i holds the fifth bits of the i-th weight of each of the eight groups.
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    codes = _nibbles(blocks[:, 48:], 32) | high.reshape(len(blocks), -1).view(np.int8) << 4
    return codes, *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> Decoded:
    count = len(blocks)
    # Each half of a block: 64 bytes of low nibbles, then of high ones; 32 bytes of pairs of bits.
    low = blocks[:, :128].reshape(count, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = (low & 15).reshape(count, 256) | (high & 3).reshape(count, 256) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return codes.view(np.int8) - np.int8(32), _halves(blocks[:, 208:]) * scales, None


def _nibbles(data: Bytes, run: int = 16) -> Codes:
    """Of each `run` bytes the low nibbles, then the high ones."""
    runs = data.reshape(len(data), -1, 1, run)
    codes = np.concatenate([runs & 15, runs >> 4], axis=2)
    return codes.reshape(len(data), -1).view(np.int8)


def _fifth_bits(data: Bytes) -> Codes:
    """Four bytes to 32 codes of 0 or 16."""
    return np.unpackbits(data, axis=1, bitorder="little").view(np.int8) << 4


def _halves(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of a K-quant's eight groups, six bits each, in units of two halves."""
    first, second, rest = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.hstack([first & 63, (rest & 15) | (first >> 2 & 48)]).astype(np.float32)
    minima = np.hstack([second & 63, (rest >> 4) | (second >> 2 & 48)]).astype(np.float32)
    return _halves(blocks[:, :2]) * scales, -(_halves(blocks[:, 2:4]) * minima)


BLOCK_TYPES: Final[Mapping[str, BlockType]] = {
    "Q4_0": BlockType("int4", 32, 18, 32, _q4_0),
    "Q4_1": BlockType("int4", 32, 20, 32, _q4_1),
    "Q5_0": BlockType("int8", 32, 22, 32, _q5_0),
    "Q5_1": BlockType("int8", 32, 24, 32, _q5_1),
    "Q8_0": BlockType("int8", 32, 34, 32, _q8_0),
    "Q4_K": BlockType("int4", 256, 144, 32, _q4_k),
    "Q5_K": BlockType("int8", 256, 176, 32, _q5_k),
    "Q6_K": BlockType("int8", 256, 210, 16, _q6_k),
}
