from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.shard import Shard

GEOMETRIES = st.builds(
    PageSlices,
    block_tokens=st.sampled_from([1, 3, 16]),
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_bytes=st.sampled_from([1, 6, 64]),
    size=st.sampled_from([1, 2, 4, 8]),
)


def page(slices: PageSlices, layers: int, seed: int = 0) -> NDArray[np.uint8]:
    shape = (layers, 2, slices.block_tokens, slices.num_kv_heads, slices.head_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def flat(array: NDArray[np.uint8]) -> memoryview:
    return memoryview(array.reshape(-1))


@given(GEOMETRIES, st.integers(1, 3))
def test_a_rank_gets_its_heads(slices: PageSlices, layers: int) -> None:
    canonical = page(slices, layers)
    for rank in range(slices.size):
        part = np.zeros(layers * slices.rank_layer_bytes, np.uint8)
        slices.scatter(rank, flat(canonical), flat(part))
        heads = Shard(rank, slices.size).kv_heads(slices.num_kv_heads)
        expected = canonical[:, :, :, heads.start : heads.stop]
        assert part.tobytes() == expected.tobytes()


@given(GEOMETRIES, st.integers(1, 3))
def test_the_owners_parts_are_the_whole_page(slices: PageSlices, layers: int) -> None:
    canonical = page(slices, layers)
    restored = np.zeros_like(canonical)
    for rank in slices.owners:
        part = np.zeros(layers * slices.rank_layer_bytes, np.uint8)
        slices.scatter(rank, flat(canonical), flat(part))
        slices.gather(rank, flat(part), flat(restored))
    assert (restored == canonical).all()
    assert len(slices.owners) * slices.rank_layer_bytes == slices.layer_bytes


@given(GEOMETRIES, GEOMETRIES, st.integers(1, 2))
def test_another_size_reads_what_one_size_wrote(
    writer: PageSlices, reader: PageSlices, layers: int
) -> None:
    reader = PageSlices(writer.block_tokens, writer.num_kv_heads, writer.head_bytes, reader.size)
    canonical = page(writer, layers)
    sent = np.zeros_like(canonical)
    for rank in writer.owners:
        part = np.zeros(layers * writer.rank_layer_bytes, np.uint8)
        writer.scatter(rank, flat(canonical), flat(part))
        writer.gather(rank, flat(part), flat(sent))
    for rank in range(reader.size):
        part = np.zeros(layers * reader.rank_layer_bytes, np.uint8)
        reader.scatter(rank, flat(sent), flat(part))
        heads = Shard(rank, reader.size).kv_heads(reader.num_kv_heads)
        assert part.tobytes() == canonical[:, :, :, heads.start : heads.stop].tobytes()


@pytest.mark.parametrize(("canonical", "part"), [(63, 32), (64, 31), (64, 64), (128, 32)])
def test_wrong_lengths_are_refused(canonical: int, part: int) -> None:
    slices = PageSlices(block_tokens=2, num_kv_heads=2, head_bytes=8, size=2)
    with pytest.raises(ValueError, match="are not the same layers"):
        slices.scatter(0, memoryview(bytearray(canonical)), memoryview(bytearray(part)))
