"""The digest that every reader checks before a block is used.

It covers the block's identity as well as its bytes: a block with the right bytes under a wrong
key, of another layout or of another length does not pass either. XXH3-128 finds faults, not
forgery; forgery is kept out by mTLS and by the leases' ids.
"""

from __future__ import annotations

import struct

import xxhash

from splitserve.errors import BlockCorrupt

DIGEST_BYTES = 16


class BlockHasher:
    """Digests one block whose content comes in pieces, in order."""

    def __init__(self, key: bytes, num_tokens: int, fingerprint: bytes, size_bytes: int) -> None:
        header = struct.pack("<III", len(key), len(fingerprint), num_tokens) + key + fingerprint
        self._state = xxhash.xxh3_128(header + size_bytes.to_bytes(8, "little"))

    def update(self, content: memoryview | bytes) -> None:
        """Takes in the next bytes. They must be contiguous."""
        self._state.update(content)

    def digest(self) -> bytes:
        """16 bytes."""
        return self._state.digest()


def block_digest(
    key: bytes, num_tokens: int, fingerprint: bytes, content: memoryview | bytes
) -> bytes:
    """The digest of a whole block, 16 bytes. Runs without the GIL for all but tiny blocks."""
    size_bytes = content.nbytes if isinstance(content, memoryview) else len(content)
    hasher = BlockHasher(key, num_tokens, fingerprint, size_bytes)
    hasher.update(content)
    return hasher.digest()


def sealed_digest(
    key: bytes, num_tokens: int, fingerprint: bytes, size_bytes: int, page_digest: bytes
) -> bytes:
    """The digest of a block that stays in a pool, 16 bytes: its identity with the digest that its
    engine took of its page.
    """
    hasher = BlockHasher(key, num_tokens, fingerprint, size_bytes)
    hasher.update(b"page digest\0" + page_digest)
    return hasher.digest()


def verify_block(
    key: bytes, num_tokens: int, fingerprint: bytes, content: memoryview | bytes, digest: bytes
) -> None:
    """Raises BlockCorrupt unless `digest` is that of this content under this identity."""
    if block_digest(key, num_tokens, fingerprint, content) != digest:
        raise BlockCorrupt(f"block {key.hex()[:16]} does not match its digest; recompute it")
