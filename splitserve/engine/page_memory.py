"""The tensors behind the page pool; see `kv.page_shape` for how a page is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from splitserve.kv.page_shape import PageShape

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_SCALES_TRIED: Final = 8
_MOST_CODE: Final[Mapping[str, float]] = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class PagedKv:
    """One layer's keys and values where they are: views of shape (pages, block_tokens, kv_heads,
    head_dim), of which only the last dimension is contiguous. Codes of 8 bits have scales, (pages,
    block_tokens, kv_heads, 1) bfloat16.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class PageMemory(Protocol):
    """Writes, gathers, exports and inserts pages by number."""

    block_tokens: int

    @property
    def storage(self) -> Tensor:
        """All pages as they lie, (pages, bytes) uint8."""

    def token_rows(self, pages: Tensor, slots: Tensor) -> Tensor:
        """Where tokens' keys and values go: (tokens,) int64 for `write`."""

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put (tokens, kv_heads, head_dim) keys and values at `rows` of `layer`."""

    def layers(self) -> list[PagedKv]:
        """Each layer's keys and values, for kernels that read them in place."""

    def gather(self, layer: int, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages in the model's type: each (sequences, kv_heads,
        pages * block_tokens, head_dim) for a page table of shape (sequences, pages), int64.
        """

    def export(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """Copy layers [first_layer, end_layer) of a page to host memory."""

    def insert(self, page: int, content: memoryview) -> None:
        """Overwrite a page from host memory."""


class PageBytes:
    """The pool's memory: all pages as bytes, and the copies that leave and enter it."""

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self._layer_bytes = shape.layer_bytes
        self.all = torch.zeros((num_pages, shape.page_bytes), dtype=torch.uint8, device=device)
        # Copies run in other threads than the engine's. In host memory numpy makes them: torch
        # would start a team of compute threads in each.
        self._host = self.all.numpy() if device.type == "cpu" else None

    def export(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `PageMemory.export`."""
        first, end = first_layer * self._layer_bytes, end_layer * self._layer_bytes
        if self._host is not None:
            np.copyto(np.frombuffer(out, np.uint8), self._host[page, first:end])
        else:
            torch.frombuffer(out, dtype=torch.uint8).copy_(self.all[page, first:end])

    def insert(self, page: int, content: memoryview) -> None:
        """See `PageMemory.insert`."""
        if self._host is not None:
            np.copyto(self._host[page], np.frombuffer(content, np.uint8))
        else:
            self.all[page].copy_(torch.frombuffer(content, dtype=torch.uint8))


class PlainPageMemory:
    """Keys and values as they are computed."""

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self.block_tokens = shape.block_tokens
        self._layers = shape.num_layers
        self._bytes = PageBytes(shape, num_pages, device)
        self.export, self.insert = self._bytes.export, self._bytes.insert
        heads = (shape.num_kv_heads, shape.head_dim)
        page = (shape.num_layers, 2, shape.block_tokens, *heads)
        self._pool = self._bytes.all.view(_DTYPES[shape.dtype]).view(num_pages, *page)
        self._token_rows = self._pool.view(-1, *heads)
        self._block_rows = self._pool.view(-1, shape.block_tokens, *heads)

    @property
    def storage(self) -> Tensor:
        """See `PageMemory`."""
        return self._bytes.all

    def token_rows(self, pages: Tensor, slots: Tensor) -> Tensor:
        """See `PageMemory`. Row numbers of tokens' keys in layer 0."""
        return pages * (self._layers * 2 * self.block_tokens) + slots

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageMemory`."""
        first = rows + layer * 2 * self.block_tokens
        self._token_rows.index_copy_(0, first, keys)
        self._token_rows.index_copy_(0, first + self.block_tokens, values)

    def layers(self) -> list[PagedKv]:
        """See `PageMemory`."""
        return [PagedKv(self._pool[:, i, 0], self._pool[:, i, 1]) for i in range(self._layers)]

    def gather(self, layer: int, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageMemory`."""
        rows = page_table * (self._layers * 2) + layer * 2
        return self._select(rows), self._select(rows + 1)

    def _select(self, rows: Tensor) -> Tensor:
        blocks = self._block_rows.index_select(0, rows.flatten())
        return _by_sequence(blocks, rows.shape[0])


class QuantizedPageMemory:
    """Keys and values in 8 bits, with a scale for each head of each token.

    A scale is rounded before codes are made with it, so that it costs range, not accuracy. A
    float's steps are relative, so that a larger scale may fit a vector's few large channels
    better: for fp8 the best of several is taken.
    """

    def __init__(
        self, shape: PageShape, num_pages: int, compute: torch.dtype, device: torch.device
    ) -> None:
        """`compute` is the type that keys and values have outside."""
        self.block_tokens = shape.block_tokens
        self._compute = compute
        self._most = _MOST_CODE[shape.dtype]
        self._rounds = shape.dtype == "int8"
        self._tried = _SCALES_TRIED if shape.dtype == "fp8" else 1
        self._code_dtype = _DTYPES[shape.dtype]
        self._bytes = PageBytes(shape, num_pages, device)
        self.export, self.insert = self._bytes.export, self._bytes.insert
        self._sections = [self._views(shape, layer) for layer in range(shape.num_layers)]

    @property
    def storage(self) -> Tensor:
        """See `PageMemory`."""
        return self._bytes.all

    def token_rows(self, pages: Tensor, slots: Tensor) -> Tensor:
        """See `PageMemory`. A page's number times the tokens of a block, plus the slot."""
        return pages * self.block_tokens + slots

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageMemory`."""
        key_codes, value_codes, key_scales, value_scales = self._sections[layer]
        place = (rows // self.block_tokens, rows % self.block_tokens)
        for source, codes, scales in (
            (keys.float(), key_codes, key_scales),
            (values.float(), value_codes, value_scales),
        ):
            scale = self._scale(source)
            coded = self._encode(source, scale)
            codes.view(torch.uint8).index_put_(place, coded.view(torch.uint8))
            scales.index_put_(place, scale)

    def layers(self) -> list[PagedKv]:
        """See `PageMemory`."""
        return [PagedKv(*sections) for sections in self._sections]

    def gather(self, layer: int, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageMemory`."""
        key_codes, value_codes, key_scales, value_scales = self._sections[layer]
        pages, sequences = page_table.flatten(), page_table.shape[0]

        def select(codes: Tensor, scales: Tensor) -> Tensor:
            wide = codes.view(torch.uint8)[pages].view(self._code_dtype).to(self._compute)
            return _by_sequence(wide * scales[pages].to(self._compute), sequences)

        return select(key_codes, key_scales), select(value_codes, value_scales)

    def _scale(self, source: Tensor) -> Tensor:
        """(tokens, heads, 1) bfloat16: that of least squared error among several, from the one
        that fits the largest value (rounded: it may be cut by 0.4%) up to twice it.
        """
        tried = self._tried
        least = source.abs().amax(-1, keepdim=True) / self._most
        if tried == 1:
            return least.to(torch.bfloat16)
        growth = torch.exp2(torch.arange(tried, device=source.device) / tried)
        scales = (least * growth).to(torch.bfloat16)[..., None, :].transpose(-1, -2)
        decoded = self._encode(source[..., None, :], scales).float() * scales.float()
        lost = (decoded - source[..., None, :]).square().sum(-1, keepdim=True)
        return scales.gather(-2, lost.argmin(-2, keepdim=True)).squeeze(-2)

    def _encode(self, source: Tensor, scale: Tensor) -> Tensor:
        scaled = source / scale.float().clamp_min(torch.finfo(torch.bfloat16).tiny)
        scaled = scaled.clamp_(-self._most, self._most)
        return (scaled.round_() if self._rounds else scaled).to(self._code_dtype)

    def _views(self, shape: PageShape, layer: int) -> list[Tensor]:
        """A layer's sections where they are: (pages, block_tokens, kv_heads, width) each."""
        start, views = layer * shape.layer_bytes, list[Tensor]()
        rows = (shape.block_tokens, shape.num_kv_heads)
        dtypes = (self._code_dtype, self._code_dtype, torch.bfloat16, torch.bfloat16)
        for width, dtype in zip(shape.sections, dtypes, strict=True):
            end = start + rows[0] * rows[1] * width
            part = self._bytes.all[:, start:end].view(-1, *rows, width)
            views.append(part.view(dtype))
            start = end
        return views


def open_page_memory(
    shape: PageShape, num_pages: int, compute: torch.dtype, device: torch.device
) -> PlainPageMemory | QuantizedPageMemory:
    """The memory for a shape, in a model that computes in `compute`."""
    if shape.is_quantized:
        return QuantizedPageMemory(shape, num_pages, compute, device)
    return PlainPageMemory(shape, num_pages, device)


def _by_sequence(blocks: Tensor, sequences: int) -> Tensor:
    """(sequences, kv_heads, tokens, head_dim) from (sequences * pages, block_tokens, ...)."""
    _, _, heads, size = blocks.shape
    return blocks.view(sequences, -1, heads, size).transpose(1, 2)
