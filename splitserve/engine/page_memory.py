"""The tensor behind the page pool.

One page is contiguous: (num_layers, 2, block_tokens, num_kv_heads, head_dim), keys before values,
so that a page, or a run of its layers, is one copy. Attention reads and writes it as rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from splitserve.models.config import ModelConfig


class PageMemory:
    """Allocates, writes, gathers, exports and inserts pages by number."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self._layers = config.num_layers
        shape = (
            num_pages,
            config.num_layers,
            2,
            block_tokens,
            config.num_kv_heads,
            config.head_dim,
        )
        self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self._token_rows = self._pool.view(-1, config.num_kv_heads, config.head_dim)
        self._block_rows = self._pool.view(-1, block_tokens, config.num_kv_heads, config.head_dim)
        self._bytes = self._pool.view(num_pages, -1).view(torch.uint8).view(num_pages, -1)
        self._layer_bytes = self._bytes.shape[1] // config.num_layers
        # Copies run in other threads than the engine's. In host memory numpy makes them: torch
        # would start a team of compute threads in each.
        self._host = self._bytes.numpy() if device.type == "cpu" else None

    def token_rows(self, pages: Tensor, slots: Tensor) -> Tensor:
        """Row numbers of tokens' keys in layer 0: (tokens,) int64. See `write`."""
        return pages * (self._layers * 2 * self.block_tokens) + slots

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put (tokens, kv_heads, head_dim) keys and values at `rows` of `layer`."""
        first = rows + layer * 2 * self.block_tokens
        self._token_rows.index_copy_(0, first, keys)
        self._token_rows.index_copy_(0, first + self.block_tokens, values)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer where they are: views of shape (pages, block_tokens,
        kv_heads, head_dim).
        """
        return [(self._pool[:, i, 0], self._pool[:, i, 1]) for i in range(self._layers)]

    def gather(self, layer: int, page_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages: each (sequences, kv_heads, pages * block_tokens,
        head_dim) for a page table of shape (sequences, pages), int64.
        """
        rows = page_table * (self._layers * 2) + layer * 2
        return self._select(rows), self._select(rows + 1)

    def export(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """Copy layers [first_layer, end_layer) of a page to host memory."""
        first, end = first_layer * self._layer_bytes, end_layer * self._layer_bytes
        if self._host is not None:
            np.copyto(np.frombuffer(out, np.uint8), self._host[page, first:end])
        else:
            torch.frombuffer(out, dtype=torch.uint8).copy_(self._bytes[page, first:end])

    def insert(self, page: int, content: memoryview) -> None:
        """Overwrite a page from host memory."""
        if self._host is not None:
            np.copyto(self._host[page], np.frombuffer(content, np.uint8))
        else:
            self._bytes[page].copy_(torch.frombuffer(content, dtype=torch.uint8))

    def _select(self, rows: Tensor) -> Tensor:
        blocks = self._block_rows.index_select(0, rows.flatten())
        _, _, heads, size = blocks.shape
        return blocks.view(rows.shape[0], -1, heads, size).transpose(1, 2)
