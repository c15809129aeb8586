"""How the keys and values of a block of tokens lie in a page. Never imports torch.

A page is contiguous, layer by layer, so that a page, or a run of its layers, is one copy. A layer
is made of sections, each (block_tokens, num_kv_heads, width) bytes: keys, then values, and where
they are quantised then the keys' scales and the values', one for each head of each token. The
layout is the same whatever computes it: workers of any tensor-parallel size understand it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

KvDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "fp8", "int8"]

ITEM_BYTES: Final[Mapping[str, int]] = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "int8": 1,
}
SCALE_BYTES: Final = 2
"""Scales are bfloat16."""


@dataclass(frozen=True)
class PageShape:
    """What a page holds. All sizes in bytes."""

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: KvDtype

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales."""
        return self.dtype in ("fp8", "int8")

    @property
    def sections(self) -> tuple[int, ...]:
        """Each section's bytes of one head of one token."""
        row = self.head_dim * ITEM_BYTES[self.dtype]
        return (row, row, SCALE_BYTES, SCALE_BYTES) if self.is_quantized else (row, row)

    @property
    def layer_bytes(self) -> int:
        """One layer of a page."""
        return self.block_tokens * self.num_kv_heads * sum(self.sections)

    @property
    def page_bytes(self) -> int:
        """A whole page."""
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """What one token takes in all layers."""
        return self.page_bytes // self.block_tokens
