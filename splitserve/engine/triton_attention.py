"""Attention over the paged pool by our Triton kernels. Imports triton: only for GPUs.

Keys and values are read where they are. The number of splits follows the batch, so bits depend on
it: deterministic mode uses `RowwiseAttention`.
"""

from __future__ import annotations

import torch
from splitserve_kernels.paged_decode import choose_splits, paged_decode
from splitserve_kernels.paged_kv import MAX_HEAD_DIM
from splitserve_kernels.paged_prefill import paged_prefill
from torch import Tensor

from splitserve.engine.batch import Chunks, QueryGroup, StepBatch
from splitserve.engine.page_memory import PlainPageMemory

__all__ = ["MAX_HEAD_DIM", "TritonAttention"]


class TritonAttention:
    """One launch for all decoding sequences, one for all chunks of prompts."""

    def __init__(self, memory: PlainPageMemory, num_processors: int) -> None:
        """`num_processors` are the device's multiprocessors, which long sequences are split for."""
        self._layers = memory.layers()
        self._block_tokens = memory.block_tokens
        self._num_processors = num_processors

    def __call__(self, layer: int, queries: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention`."""
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for group in batch.groups:
            if group.count == 1:
                self._decode(layer, queries, group, out)
        if batch.chunks:
            self._prefill(layer, queries, batch.chunks, out)
        return out

    def _decode(self, layer: int, queries: Tensor, group: QueryGroup, out: Tensor) -> None:
        rows = slice(group.first_row, group.first_row + group.sequences)
        keys, values = self._layers[layer]
        room = group.page_table.shape[1] * self._block_tokens
        paged_decode(
            queries[rows],
            keys,
            values,
            group.page_table,
            group.lengths,
            out[rows],
            num_splits=choose_splits(group.sequences, keys.shape[2], room, self._num_processors),
        )

    def _prefill(self, layer: int, queries: Tensor, chunks: Chunks, out: Tensor) -> None:
        keys, values = self._layers[layer]
        paged_prefill(
            queries,
            keys,
            values,
            chunks.page_table,
            chunks.row_starts,
            chunks.lengths,
            out,
            max_queries=chunks.most_rows,
        )
