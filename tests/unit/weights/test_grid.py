from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.errors import CheckpointError
from splitserve.weights import grid as grid_module
from splitserve.weights.grid import Grid, covering, merged, pieces
from splitserve.weights.stored import StoredTensor


@st.composite
def spans(draw, size: int):
    result = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        result.append(range(start, stop, draw(st.integers(1, 3))))
    return result


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_rectangle_is_what_indexing_takes(tmp_path, monkeypatch, data):
    count, height, width, item = (data.draw(st.integers(1, most)) for most in (3, 12, 9, 5))
    monkeypatch.setattr(grid_module, "_SLAB_BYTES", data.draw(st.sampled_from([1, 40, 1 << 20])))
    monkeypatch.setattr(grid_module, "_GAP_BYTES", data.draw(st.sampled_from([1, 10, 1 << 20])))
    values = np.random.default_rng(0).integers(0, 256, (count, height, width, item), np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"head" + values.tobytes() + b"tail")
    stored = StoredTensor("t", path, "U8", values.shape, 4, values.nbytes)
    index = data.draw(st.integers(0, count - 1))
    rows = data.draw(st.none() | spans(height))
    columns = data.draw(st.none() | spans(width))
    got = Grid(stored, height, width, item, index).read(rows, columns)
    row_numbers = [n for span in rows or [range(height)] for n in span]
    column_numbers = [n for span in columns or [range(width)] for n in span]
    expected = values[index][row_numbers][:, column_numbers]
    assert np.array_equal(got, expected.reshape(len(row_numbers), -1))


def test_contiguous_rows_are_one_read_of_only_their_bytes(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def spy(descriptor, buffers, offset):
        reads.append((offset, len(buffers[0])))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    grid = Grid(StoredTensor("t", path, "U8", (10, 10), 0, 100), 10, 10, 1)
    grid.read([range(2, 4), range(4, 5), range(7, 9)])
    assert reads == [(20, 30), (70, 20)]
    reads.clear()
    # Parts of rows: one slab from the first wanted byte to the last.
    assert grid.read([range(2, 5)], [range(3, 6)]).tolist() == [
        [23, 24, 25], [33, 34, 35], [43, 44, 45]
    ]  # fmt: skip
    assert reads == [(23, 23)]
    reads.clear()
    # Where much would be dropped, each part alone.
    monkeypatch.setattr(grid_module, "_GAP_BYTES", 7)
    grid.read([range(2, 5)], [range(3, 6)])
    assert reads == [(23, 3), (33, 3), (43, 3)]


def test_a_part_costs_the_memory_of_a_part(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 23))
    grid = Grid(StoredTensor("t", path, "BF16", (1024, 4096), 0, 1 << 23), 1024, 4096, 2)
    tracemalloc.start()
    try:
        part = grid.read(None, [range(1024, 2048)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert part.nbytes == 1 << 21
    assert peak < part.nbytes + (1 << 20) + 50_000


def test_rows_that_are_not_there_are_a_mistake_of_the_caller(tmp_path):
    grid = Grid(StoredTensor("t", tmp_path / "x", "U8", (4, 2), 0, 8), 4, 2, 1)
    for rows in ([range(5)], [range(-1, 2)], [range(3, 0, -1)]):
        with pytest.raises(ValueError, match="is not inside"):
            grid.read(rows)


def test_a_file_that_shrank(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5))
    grid = Grid(StoredTensor("t", path, "U8", (4, 2), 0, 8), 4, 2, 1)
    with pytest.raises(CheckpointError, match=r"tensor 't' cannot be read: the file ended 3 bytes"):
        grid.read()


def test_ranges():
    assert merged([range(3), range(0), range(3, 5), range(6, 7)]) == [range(5), range(6, 7)]
    assert list(pieces([range(5), range(10, 12)], 2)) == [
        (0, range(2)), (2, range(2, 4)), (4, range(4, 5)), (5, range(10, 12))
    ]  # fmt: skip
    assert covering([range(3, 9), range(16, 17)], 8) == [range(2), range(2, 3)]
