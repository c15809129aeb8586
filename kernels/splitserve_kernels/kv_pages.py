"""Ranges of scattered pages to and from one contiguous buffer, and whole pages from one pool to
another, for the KV hand-over.

A run of layers is one range of bytes in every page, see `splitserve.kv.page_shape`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_BYTES = 16384
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def pack_pages(pool: Tensor, pages: Tensor, first_byte: int, end_byte: int, out: Tensor) -> None:
    """Copy bytes [first_byte, end_byte) of each page into a row of `out`.

    pool: (num_pages, page_bytes) uint8, contiguous in the last dimension
    pages: (n,) int64, each below num_pages
    out: (n, end_byte - first_byte) uint8, contiguous in the last dimension

    Raises `ValueError` for shapes and types that do not go together.
    """
    _copy(pool, pages, first_byte, end_byte, out, packs=True)


def unpack_pages(pool: Tensor, pages: Tensor, first_byte: int, end_byte: int, rows: Tensor) -> None:
    """Copy each row of `rows` into bytes [first_byte, end_byte) of its page; see `pack_pages`. No
    page may be named twice.
    """
    _copy(pool, pages, first_byte, end_byte, rows, packs=False)


def pack_pages_reference(
    pool: Tensor, pages: Tensor, first_byte: int, end_byte: int, out: Tensor
) -> None:
    """`pack_pages` in plain torch."""
    out.copy_(pool[pages, first_byte:end_byte])


def unpack_pages_reference(
    pool: Tensor, pages: Tensor, first_byte: int, end_byte: int, rows: Tensor
) -> None:
    """`unpack_pages` in plain torch."""
    pool[pages, first_byte:end_byte] = rows


def copy_pages(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    *,
    programs: int | None = None,
) -> None:
    """Copy each page of one pool to a page of another, or of the same, in one launch.

    source, target: (num_pages, page_bytes) uint8, contiguous in the last dimension. Either may be
        memory of another device or of the host, as long as this device can map it.
    source_pages, target_pages: (n,) int64. No page may be a target twice, or target and source.
    programs: how many to launch at most, for memory so slow that a few of them keep it busy: each
        copies one tile after the other, and the other processors are left alone.

    Raises `ValueError` for shapes and types that do not go together.
    """
    size = target.shape[1]
    if source.shape[1] != size or source_pages.shape != target_pages.shape:
        raise ValueError(
            f"{len(source_pages)} pages of {source.shape[1]} bytes to {len(target_pages)} of {size}"
        )
    if source.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError("pools must be uint8")
    if source_pages.dtype != torch.int64 or target_pages.dtype != torch.int64:
        raise ValueError("page numbers must be int64")
    if source.stride(1) != 1 or target.stride(1) != 1:
        raise ValueError("each page must be contiguous")
    if size == 0 or len(source_pages) == 0:
        return
    common = source.data_ptr() | target.data_ptr() | source.stride(0) | target.stride(0) | size
    word = next(dtype for dtype in _WORDS if common % dtype.itemsize == 0)
    width = word.itemsize
    tile = min(_TILE_BYTES // width, triton.next_power_of_2(size // width))
    tiles = triton.cdiv(size // width, tile)
    count = tiles * len(source_pages)
    _copy_whole_pages[(min(count, programs or count),)](
        _words(source, word),
        source_pages,
        _words(target, word),
        target_pages,
        source.stride(0) // width,
        target.stride(0) // width,
        size // width,
        tiles,
        count,
        TILE=tile,
        num_warps=8 if tile >= 1024 else 2,
    )


def copy_pages_reference(
    source: Tensor, source_pages: Tensor, target: Tensor, target_pages: Tensor
) -> None:
    """`copy_pages` in plain torch."""
    target[target_pages] = source[source_pages]


def _copy(
    pool: Tensor, pages: Tensor, first_byte: int, end_byte: int, rows: Tensor, *, packs: bool
) -> None:
    size = end_byte - first_byte
    if not 0 <= first_byte <= end_byte <= pool.shape[1]:
        raise ValueError(f"bytes [{first_byte}, {end_byte}) of pages of {pool.shape[1]}")
    if rows.shape != (len(pages), size):
        raise ValueError(f"{tuple(rows.shape)} bytes for {len(pages)} ranges of {size}")
    if pool.dtype != torch.uint8 or rows.dtype != torch.uint8 or pages.dtype != torch.int64:
        raise ValueError("pool and rows must be uint8, pages int64")
    if pool.stride(1) != 1 or rows.stride(1) != 1:
        raise ValueError("each page and each row must be contiguous")
    if size == 0 or len(pages) == 0:
        return
    common = pool.data_ptr() | rows.data_ptr() | pool.stride(0) | rows.stride(0) | first_byte | size
    word = next(dtype for dtype in _WORDS if common % dtype.itemsize == 0)
    width = word.itemsize
    tile = min(_TILE_BYTES // width, triton.next_power_of_2(size // width))
    _copy_pages[(len(pages), triton.cdiv(size // width, tile))](
        _words(pool, word),
        pages,
        _words(rows, word),
        pool.stride(0) // width,
        rows.stride(0) // width,
        first_byte // width,
        size // width,
        PACKS=packs,
        TILE=tile,
        num_warps=8 if tile >= 1024 else 2,
    )


def _words(memory: Tensor, dtype: torch.dtype) -> Tensor:
    """The same memory in wider words. Only its address and type are used."""
    width = dtype.itemsize
    if memory.shape[1] % width:
        memory = memory[:, : memory.shape[1] // width * width]
    return memory.view(dtype)


@triton.jit(do_not_specialize_on_alignment=["pages"])
def _copy_pages(
    # pointers
    pool: tl.tensor,
    pages: tl.tensor,
    rows: tl.tensor,
    # strides, in words
    page_stride: tl.tensor,
    row_stride: tl.tensor,
    # sizes, in words
    first: tl.tensor,
    size: tl.tensor,
    # constants
    PACKS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A tile of one page's range."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_pool = pool + tl.load(pages + row) * page_stride + first + columns
    in_rows = rows + row * row_stride + columns
    inside = columns < size
    if PACKS:
        tl.store(in_rows, tl.load(in_pool, mask=inside), mask=inside)
    else:
        tl.store(in_pool, tl.load(in_rows, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=["tiles", "count"],
    do_not_specialize_on_alignment=["source_pages", "target_pages"],
)
def _copy_whole_pages(
    # pointers
    source: tl.tensor,
    source_pages: tl.tensor,
    target: tl.tensor,
    target_pages: tl.tensor,
    # strides, in words
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    # sizes, in words
    size: tl.tensor,
    # counts: tiles of a page, tiles in all
    tiles: tl.tensor,
    count: tl.tensor,
    # constants
    TILE: tl.constexpr,
) -> None:
    """Every so manieth tile of all pages."""
    for at in range(tl.program_id(0), count, tl.num_programs(0)):
        row = at // tiles
        columns = (at % tiles) * TILE + tl.arange(0, TILE)
        inside = columns < size
        in_source = source + tl.load(source_pages + row) * source_stride + columns
        in_target = target + tl.load(target_pages + row) * target_stride + columns
        tl.store(in_target, tl.load(in_source, mask=inside), mask=inside)
