"""Reads rectangles of stored tensors into arrays. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from splitserve.weights.stored import ReadInto, StoredTensor

Bytes: TypeAlias = NDArray[np.uint8]

_SLAB_BYTES: Final = 1 << 20
# Parts of rows are cut from slabs of whole rows that are read at once: a read of a part alone
# costs a call a row, which takes as long as reading about this many bytes more from the page
# cache (4,096 rows of 8 KiB, half of each wanted: 2.2 ms in slabs, 7.3 ms a row at a time).
_GAP_BYTES: Final = 1 << 15


@dataclass(frozen=True)
class Grid:
    """A stored tensor, or number `index` of a stored stack, as `rows` rows of `width` items.

    An item is a number, a word of packed codes or a block, `item_bytes` long.
    """

    stored: StoredTensor
    rows: int
    width: int
    item_bytes: int
    index: int = 0

    def read(
        self, rows: Sequence[range] | None = None, columns: Sequence[range] | None = None
    ) -> Bytes:
        """(rows, columns * item_bytes): these rows and columns in this order, None for all.

        At most a slab of bytes that are not wanted is held besides.
        """
        spans = merged([range(self.rows)] if rows is None else rows)
        parts = merged([range(self.width)] if columns is None else columns)
        _check_inside(spans, self.rows)
        _check_inside(parts, self.width)
        out = np.empty((sum(map(len, spans)), sum(map(len, parts)), self.item_bytes), np.uint8)
        if out.size:
            with self.stored.reading() as read_into:
                top = 0
                for span in spans:
                    self._read_span(read_into, span, parts, out[top : top + len(span)])
                    top += len(span)
        return out.reshape(out.shape[0], -1)

    def _read_span(
        self, read_into: ReadInto, rows: range, columns: list[range], out: Bytes
    ) -> None:
        row_bytes = self.width * self.item_bytes
        start = self.index * self.rows * row_bytes
        if rows.step == 1 and columns == [range(self.width)]:
            read_into(_memory(out), start + rows.start * row_bytes)
            return
        first = min(part.start for part in columns)
        span_bytes = (max(part[-1] for part in columns) + 1 - first) * self.item_bytes
        pitch = rows.step * row_bytes
        height = 1 if pitch - span_bytes >= _GAP_BYTES else max(1, _SLAB_BYTES // pitch)
        slab = np.empty((height * rows.step, self.width, self.item_bytes), np.uint8)
        for top in range(0, len(rows), height):
            part = rows[top : top + height]
            size = (part[-1] - part.start) * row_bytes + span_bytes
            position = start + part.start * row_bytes + first * self.item_bytes
            read_into(_memory(slab)[:size], position)
            left = 0
            for column in columns:
                taken = slice(column.start - first, column[-1] + 1 - first, column.step)
                wanted = slab[: len(part) * rows.step : rows.step, taken]
                out[top : top + len(part), left : left + len(column)] = wanted
                left += len(column)


def merged(spans: Sequence[range]) -> list[range]:
    """The same numbers in the same order, in as few ranges as is easily told."""
    result: list[range] = []
    for span in spans:
        if not span:
            continue
        if result and result[-1].step == span.step == 1 and result[-1].stop == span.start:
            result[-1] = range(result[-1].start, span.stop)
        else:
            result.append(span)
    return result


def pieces(spans: Sequence[range], most: int) -> Iterator[tuple[int, range]]:
    """`spans` in order in parts of at most `most`, each with how many came before it."""
    before = 0
    for span in spans:
        for start in range(0, len(span), most):
            part = span[start : start + most]
            yield before, part
            before += len(part)


def covering(spans: Sequence[range], size: int) -> list[range]:
    """Of each span the words that hold its numbers, `size` a word."""
    return [range(span.start // size, span[-1] // size + 1) for span in spans]


def _check_inside(spans: list[range], size: int) -> None:
    for span in spans:
        if span.step < 1 or span.start < 0 or span[-1] >= size:
            raise ValueError(f"{span} is not inside 0..{size}")


def _memory(array: Bytes) -> memoryview:
    return array.reshape(-1).data
