"""The digest of a page, 16 bytes, in plain numpy. Never imports torch or triton.

A page is 64-bit words, little-endian. Each of two lanes sums over all words what its own mixing
makes of word and position, modulo 2^64, so that any part can be computed by itself, in any order;
the sums are mixed once more at the end. Mixing is one to one: any change of a single word changes
both sums for certain. It finds faults, not forgery.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

WORD_BYTES: Final = 8
LANES: Final = 2

# Of each lane: what is added for a position, and two odd multipliers. All are below 2^63.
STEPS: Final = (0x1E3779B97F4A7C15, 0x5851F42D4C957F2D)
FIRST: Final = (0x3F58476D1CE4E5B9, 0x6C8E9CF570932BD5)
SECOND: Final = (0x14D049BB133111EB, 0x2545F4914F6CDD1D)
_MASK: Final = (1 << 64) - 1


def digest_pages_reference(pool: NDArray[np.uint8], pages: Sequence[int]) -> list[bytes]:
    """Digests of some rows of `pool`, (pages, bytes) with bytes a multiple of 8."""
    words = pool[list(pages)].view("<u8")
    position = np.arange(1, words.shape[1] + 1, dtype=np.uint64)
    lanes = [
        _mix(words ^ (position * np.uint64(STEPS[lane])), lane).sum(1, dtype=np.uint64)
        for lane in range(LANES)
    ]
    return finish(np.stack(lanes, 1), pool.shape[1])


def finish(sums: NDArray[np.uint64], page_bytes: int) -> list[bytes]:
    """Digests from the sums of each page's lanes, (pages, LANES)."""
    lengths = [np.uint64(page_bytes * step & _MASK) for step in STEPS]
    lanes = [_mix(sums[:, lane] ^ lengths[lane], lane) for lane in range(LANES)]
    digests = np.stack(lanes, 1).astype("<u8").tobytes()
    size = LANES * WORD_BYTES
    return [digests[start : start + size] for start in range(0, len(digests), size)]


def _mix(words: NDArray[np.uint64], lane: int) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(32))) * np.uint64(FIRST[lane])
    words = (words ^ (words >> np.uint64(29))) * np.uint64(SECOND[lane])
    return words ^ (words >> np.uint64(32))
