"""The digest that every reader checks before a block is used.

It covers the block's identity as well as its bytes: a block with the right bytes under a wrong
key, of another layout or of another length does not pass either. XXH3-128 finds faults, not
forgery; forgery is kept out by mTLS and by the leases' ids.

It is of the bytes themselves, or of the digest that a device takes of a page where it is; the first
byte says which. Whoever has the bytes can check either.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash
from splitserve_kernels.page_digest_rules import WORD_BYTES, digest_pages_reference

from splitserve.errors import BlockCorrupt

DIGEST_BYTES = 17
_OF_BYTES, _OF_PAGE = b"\0", b"\1"


class BlockHasher:
    """Digests one block whose content comes in pieces, in order."""

    def __init__(self, key: bytes, num_tokens: int, fingerprint: bytes, size_bytes: int) -> None:
        self._state = _identity(key, num_tokens, fingerprint, size_bytes)

    def update(self, content: memoryview | bytes) -> None:
        """Takes in the next bytes. They must be contiguous."""
        self._state.update(content)

    def digest(self) -> bytes:
        """DIGEST_BYTES."""
        return _OF_BYTES + self._state.digest()


def block_digest(
    key: bytes, num_tokens: int, fingerprint: bytes, content: memoryview | bytes
) -> bytes:
    """The digest of a whole block. Runs without the GIL for all but tiny blocks."""
    size_bytes = content.nbytes if isinstance(content, memoryview) else len(content)
    hasher = BlockHasher(key, num_tokens, fingerprint, size_bytes)
    hasher.update(content)
    return hasher.digest()


def sealed_digest(
    key: bytes, num_tokens: int, fingerprint: bytes, size_bytes: int, page_digest: bytes
) -> bytes:
    """The digest of a block whose engine has digested its page."""
    state = _identity(key, num_tokens, fingerprint, size_bytes)
    state.update(b"page digest\0" + page_digest)
    return _OF_PAGE + state.digest()


def is_of_page(digest: bytes) -> bool:
    """Whether an engine that digests pages can check it."""
    return digest[:1] == _OF_PAGE


def is_digest_of(
    digest: bytes, key: bytes, num_tokens: int, fingerprint: bytes, content: memoryview | bytes
) -> bool:
    """Whether it is that of this content under this identity, of whichever kind. That of a page is
    taken at some 0.4 GB/s here.
    """
    if not is_of_page(digest):
        return block_digest(key, num_tokens, fingerprint, content) == digest
    page = np.frombuffer(content, np.uint8)[None]
    if page.shape[1] % WORD_BYTES:
        return False
    [page_digest] = digest_pages_reference(page, [0])
    return sealed_digest(key, num_tokens, fingerprint, page.nbytes, page_digest) == digest


def verify_block(
    key: bytes, num_tokens: int, fingerprint: bytes, content: memoryview | bytes, digest: bytes
) -> None:
    """Raises BlockCorrupt unless `digest` is that of this content under this identity."""
    if not is_digest_of(digest, key, num_tokens, fingerprint, content):
        raise BlockCorrupt(f"block {key.hex()[:16]} does not match its digest; recompute it")


def _identity(key: bytes, num_tokens: int, fingerprint: bytes, size_bytes: int) -> xxhash.xxh3_128:
    header = struct.pack("<III", len(key), len(fingerprint), num_tokens) + key + fingerprint
    return xxhash.xxh3_128(header + size_bytes.to_bytes(8, "little"))
