"""The digest finds any change of content or identity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve_kernels.page_digest_rules import digest_pages_reference

from splitserve.errors import BlockCorrupt
from splitserve.kv.codec import (
    DIGEST_BYTES,
    BlockHasher,
    block_digest,
    is_digest_of,
    is_of_page,
    sealed_digest,
    verify_block,
)

KEY, FINGERPRINT = b"k" * 32, b"f" * 32


def test_is_the_same_in_every_process_and_release():
    digest = block_digest(KEY, 16, FINGERPRINT, b"content")
    assert digest.hex() == "00ed6f916e1b77d9b918cb43b7d3daa065"


def test_a_memoryview_and_bytes_agree():
    assert block_digest(KEY, 16, FINGERPRINT, memoryview(bytearray(b"abc"))) == block_digest(
        KEY, 16, FINGERPRINT, b"abc"
    )


@given(st.binary(min_size=1, max_size=300), st.data())
def test_pieces_in_order_are_the_whole(content, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    hasher = BlockHasher(KEY, 3, FINGERPRINT, len(content))
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        hasher.update(content[start:end])
    assert hasher.digest() == block_digest(KEY, 3, FINGERPRINT, content)
    assert len(hasher.digest()) == DIGEST_BYTES


@given(st.binary(min_size=1, max_size=200), st.data())
def test_one_changed_bit_is_found(content, data):
    digest = block_digest(KEY, 16, FINGERPRINT, content)
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BlockCorrupt):
        verify_block(KEY, 16, FINGERPRINT, damaged, digest)


@pytest.mark.parametrize(
    ("key", "num_tokens", "fingerprint", "content"),
    [
        (b"K" * 32, 16, FINGERPRINT, b"content"),
        (KEY, 15, FINGERPRINT, b"content"),
        (KEY, 16, b"F" * 32, b"content"),
        (KEY, 16, FINGERPRINT, b"content\0"),
        (KEY, 16, FINGERPRINT, b""),
    ],
)
def test_every_part_of_the_identity_counts(key, num_tokens, fingerprint, content):
    digest = block_digest(KEY, 16, FINGERPRINT, b"content")
    with pytest.raises(BlockCorrupt, match="recompute"):
        verify_block(key, num_tokens, fingerprint, content, digest)
    verify_block(KEY, 16, FINGERPRINT, b"content", digest)


def test_a_byte_cannot_move_between_key_and_fingerprint():
    assert block_digest(b"ab", 1, b"c", b"") != block_digest(b"a", 1, b"bc", b"")


@given(st.integers(1, 20).flatmap(lambda words: st.binary(min_size=8 * words, max_size=8 * words)))
def test_who_has_the_bytes_can_check_a_digest_of_their_page(content):
    [page] = digest_pages_reference(np.frombuffer(content, np.uint8)[None], [0])
    digest = sealed_digest(KEY, 16, FINGERPRINT, len(content), page)
    assert len(digest) == DIGEST_BYTES
    assert is_of_page(digest)
    assert not is_of_page(block_digest(KEY, 16, FINGERPRINT, content))
    verify_block(KEY, 16, FINGERPRINT, memoryview(content), digest)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 4
    assert not is_digest_of(digest, KEY, 16, FINGERPRINT, damaged)
    assert not is_digest_of(digest, KEY, 15, FINGERPRINT, content)
    assert not is_digest_of(digest, KEY, 16, FINGERPRINT, content[:-1]), "no whole words"
    assert not is_digest_of(digest[:1] + bytes(16), KEY, 16, FINGERPRINT, content)
