"""Between a page with all KV heads and the parts of it that the ranks have.

A page as the store and other workers see it is canonical: (layers, 2, block_tokens, num_kv_heads,
head_bytes) bytes, whatever the tensor-parallel size, so that tiers of different sizes understand
each other. A rank's own page has the same dimensions with its own heads alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitserve.parallel.shard import Shard


@dataclass(frozen=True)
class PageSlices:
    """Copies one rank's heads in and out of canonical bytes.

    `head_bytes` is what one head of one token takes, with whatever scales are stored beside it.
    Bytes may be of any number of whole layers; both sides then have the same layers. A wrong
    length raises `ValueError`.
    """

    block_tokens: int
    num_kv_heads: int
    head_bytes: int
    size: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of a canonical page."""
        return self._layer_bytes(self.num_kv_heads)

    @property
    def rank_layer_bytes(self) -> int:
        """Bytes of one layer of a rank's page; all ranks have as many heads."""
        return self._layer_bytes(len(self._heads(0)))

    @property
    def owners(self) -> range:
        """The ranks that have each head once: the first of those that replicate one."""
        return range(0, self.size, Shard(0, self.size).kv_replicas(self.num_kv_heads))

    def scatter(self, rank: int, canonical: memoryview, out: memoryview) -> None:
        """Copy the heads of `rank` out of `canonical` into `out`."""
        whole, part = self._views(rank, canonical, out)
        np.copyto(part, whole)

    def gather(self, rank: int, part: memoryview, out: memoryview) -> None:
        """Copy the heads of `rank` from `part` to their places in `out`, which is canonical."""
        whole, own = self._views(rank, out, part)
        np.copyto(whole, own)

    def _views(
        self, rank: int, canonical: memoryview, part: memoryview
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Both as (tokens of all layers, bytes of this rank's heads)."""
        heads = self._heads(rank)
        layers, rest = divmod(len(canonical), self.layer_bytes)
        if rest or len(part) != layers * self.rank_layer_bytes:
            raise ValueError(
                f"{len(canonical)} and {len(part)} bytes are not the same layers of "
                f"{self.layer_bytes} and {self.rank_layer_bytes} bytes each"
            )
        rows = layers * 2 * self.block_tokens
        whole = np.frombuffer(canonical, np.uint8).reshape(rows, -1)
        first, end = heads.start * self.head_bytes, heads.stop * self.head_bytes
        return whole[:, first:end], np.frombuffer(part, np.uint8).reshape(rows, -1)

    def _heads(self, rank: int) -> range:
        return Shard(rank, self.size).kv_heads(self.num_kv_heads)

    def _layer_bytes(self, heads: int) -> int:
        return 2 * self.block_tokens * heads * self.head_bytes
