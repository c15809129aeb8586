from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from splitserve.kv.page_shape import PageShape
from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.shard import Shard

SIZES = st.sampled_from([1, 2, 4, 8])
GEOMETRIES = st.builds(
    PageSlices,
    st.builds(
        PageShape,
        num_layers=st.integers(1, 3),
        block_tokens=st.sampled_from([1, 3, 16]),
        num_kv_heads=st.sampled_from([1, 2, 4, 8]),
        head_dim=st.sampled_from([1, 6, 32]),
        dtype=st.sampled_from(["float32", "bfloat16", "fp8", "int8"]),
    ),
    SIZES,
)


def content(slices: PageSlices) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, slices.page.page_bytes, np.uint8)


def rank_part(slices: PageSlices) -> NDArray[np.uint8]:
    return np.zeros(slices.rank_page.page_bytes, np.uint8)


def heads_of(slices: PageSlices, rank: int, canonical: NDArray[np.uint8]) -> bytes:
    """A rank's page, put together head by head."""
    page, found, start = slices.page, b"", 0
    heads = Shard(rank, slices.size).kv_heads(page.num_kv_heads)
    for _ in range(page.num_layers):
        for width in page.sections:
            for _ in range(page.block_tokens):
                for head in range(page.num_kv_heads):
                    if head in heads:
                        found += canonical[start : start + width].tobytes()
                    start += width
    return found


@given(GEOMETRIES)
def test_a_rank_gets_its_heads(slices: PageSlices) -> None:
    canonical = content(slices)
    for rank in range(slices.size):
        part = rank_part(slices)
        slices.scatter(rank, memoryview(canonical), memoryview(part))
        assert part.tobytes() == heads_of(slices, rank, canonical)


@given(GEOMETRIES, SIZES)
def test_another_size_reads_what_one_size_wrote(writer: PageSlices, reading: int) -> None:
    reader = replace(writer, size=reading)
    canonical = content(writer)
    sent = np.zeros_like(canonical)
    for rank in writer.owners:
        part = rank_part(writer)
        writer.scatter(rank, memoryview(canonical), memoryview(part))
        writer.gather(rank, memoryview(part), memoryview(sent))
    assert (sent == canonical).all()
    assert len(writer.owners) * writer.rank_layer_bytes == writer.page.layer_bytes
    for rank in range(reader.size):
        part = rank_part(reader)
        reader.scatter(rank, memoryview(sent), memoryview(part))
        assert part.tobytes() == heads_of(reader, rank, canonical)


@pytest.mark.parametrize(("canonical", "part"), [(63, 32), (64, 31), (64, 64), (128, 32)])
def test_wrong_lengths_are_refused(canonical: int, part: int) -> None:
    slices = PageSlices(PageShape(1, 2, 2, 4, "bfloat16"), size=2)
    with pytest.raises(ValueError, match="are not the same layers"):
        slices.scatter(0, memoryview(bytearray(canonical)), memoryview(bytearray(part)))
