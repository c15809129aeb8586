"""Between a page with all KV heads and the parts of it that the ranks have.

A page as the store and other workers see it is canonical (`kv.page_shape`), whatever the
tensor-parallel size, so that tiers of different sizes understand each other. A rank's own page is
laid out the same way with its own heads alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from splitserve.kv.page_shape import PageShape
from splitserve.parallel.shard import Shard

_Rows = NDArray[np.uint8]


@dataclass(frozen=True)
class PageSlices:
    """Copies one rank's heads in and out of canonical bytes.

    `page` has all KV heads. Bytes may be of any number of whole layers; both sides then have the
    same layers. A wrong length raises `ValueError`.
    """

    page: PageShape
    size: int

    @property
    def rank_page(self) -> PageShape:
        """A rank's own page; all ranks have as many heads."""
        return replace(self.page, num_kv_heads=len(self._heads(0)))

    @property
    def rank_layer_bytes(self) -> int:
        """Bytes of one layer of a rank's page."""
        return self.rank_page.layer_bytes

    @property
    def owners(self) -> range:
        """The ranks that have each head once: the first of those that replicate one."""
        return range(0, self.size, Shard(0, self.size).kv_replicas(self.page.num_kv_heads))

    def scatter(self, rank: int, canonical: memoryview, out: memoryview) -> None:
        """Copy the heads of `rank` out of `canonical` into `out`."""
        for whole, part in self._views(rank, canonical, out):
            np.copyto(part, whole)

    def gather(self, rank: int, part: memoryview, out: memoryview) -> None:
        """Copy the heads of `rank` from `part` to their places in `out`, which is canonical."""
        for whole, own in self._views(rank, out, part):
            np.copyto(whole, own)

    def _views(
        self, rank: int, canonical: memoryview, part: memoryview
    ) -> Iterator[tuple[_Rows, _Rows]]:
        """Of each section both sides' (layers, block_tokens, bytes of this rank's heads)."""
        heads, rank_page = self._heads(rank), self.rank_page
        layers, rest = divmod(len(canonical), self.page.layer_bytes)
        if rest or len(part) != layers * rank_page.layer_bytes:
            raise ValueError(
                f"{len(canonical)} and {len(part)} bytes are not the same layers of "
                f"{self.page.layer_bytes} and {rank_page.layer_bytes} bytes each"
            )
        whole = _sections(self.page, canonical)
        own = _sections(rank_page, part)
        for width, all_heads, own_heads in zip(self.page.sections, whole, own, strict=True):
            yield all_heads[:, :, heads.start * width : heads.stop * width], own_heads

    def _heads(self, rank: int) -> range:
        return Shard(rank, self.size).kv_heads(self.page.num_kv_heads)


def _sections(page: PageShape, content: memoryview) -> Iterator[_Rows]:
    """A page's sections where they are: (layers, block_tokens, bytes of all heads) each."""
    layers = np.frombuffer(content, np.uint8).reshape(-1, page.layer_bytes)
    token_bytes = page.block_tokens * page.num_kv_heads
    ends = np.cumsum([0, *(token_bytes * width for width in page.sections)]).tolist()
    for start, end in pairwise(ends):
        yield layers[:, start:end].reshape(len(layers), page.block_tokens, -1)
