"""Content-addressed names of KV blocks.

A block's key is a SHA-256 chain: it covers the model, the tenant, every token before the block
and the block's own tokens. Equal prefixes therefore have equal keys on any worker, and a block
that sits under a wrong key can only be there by a fault (the digest finds it, see `codec`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

KEY_BYTES = 32


def root_key(model_fingerprint: bytes, cache_salt: bytes) -> bytes:
    """The parent of a sequence's first block. Different tenants or models never meet."""
    digest = hashlib.sha256(b"splitserve-kv-1\0")
    for part in (model_fingerprint, cache_salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def child_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of the block that holds `token_ids` and follows `parent`."""
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return hashlib.sha256(parent + len(token_ids).to_bytes(4, "little") + tokens).digest()


def chain_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of all blocks of a prompt, in order.

    The last block may be partial: its key covers just the tokens it has, so it never equals the
    key of the full block that a longer prompt would have there.
    """
    keys, parent = [], root
    for start in range(0, len(token_ids), block_tokens):
        parent = child_key(parent, token_ids[start : start + block_tokens])
        keys.append(parent)
    return keys
