"""Attention over the paged pool by our Triton kernels. Imports triton: only for GPUs.

Keys and values are read where they are. How a long sequence is split follows the batch, so bits
depend on it: deterministic mode uses `RowwiseAttention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from splitserve_kernels.paged_decode import DecodePlan, paged_decode, plan_decode
from splitserve_kernels.paged_prefill import paged_prefill
from splitserve_kernels.rotary import rotate_and_store, rotate_and_store_codes
from torch import Tensor

from splitserve.engine.page_memory import PagedKv
from splitserve.models.layers.rotary import Rotation
from splitserve.models.layers.self_attention import Attend, AttentionRules


@dataclass(frozen=True)
class Decoding:
    """Rows [0, sequences) of a step: one query of each sequence."""

    page_table: Tensor
    """(sequences, pages) int32."""
    lengths: Tensor
    """(sequences,) int32: tokens to attend to, the new one included; 0 for nobody's row."""
    plans: Mapping[int | None, DecodePlan]
    """By the window of a layer."""


@dataclass(frozen=True)
class Chunks:
    """The other rows of a step: chunks of several prompts."""

    page_table: Tensor
    """(chunks, pages) int32."""
    row_starts: Tensor
    """(chunks + 1,) int64: chunk c has rows [row_starts[c], row_starts[c + 1])."""
    lengths: Tensor
    """(chunks,) int64: tokens to attend to, the new ones included."""


@dataclass(frozen=True)
class StepRows:
    """Whose the rows of a step are."""

    kv_rows: Tensor
    """(rows,) int64: where each row's key goes, page * block_tokens + slot; -1 for nobody's."""
    decoding: Decoding | None
    chunks: Chunks | None
    padded: bool = False
    """Whether there are rows after the last chunk's."""


class TritonAttention:
    """One launch a layer that turns and stores, one for all decoding rows, one for all chunks."""

    def __init__(
        self, layers: Sequence[PagedKv], rules: Sequence[AttentionRules], num_processors: int
    ) -> None:
        """`layers` and `rules` are each layer's; `num_processors` are the device's."""
        self._layers = layers
        self._rules = rules
        self._windows = {each.window for each in rules}
        self._num_processors = num_processors

    def plans(self, lengths: Tensor) -> dict[int | None, DecodePlan]:
        """How a step's decoding rows are shared out over the device, for all layers."""
        kv_heads = self._layers[0].keys.shape[2]
        return {
            window: plan_decode(
                lengths, kv_heads=kv_heads, num_processors=self._num_processors, window=window
            )
            for window in self._windows
        }

    def over(self, rows: StepRows) -> Attend:
        """A step's `Attend`."""

        def attend(
            layer: int, queries: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None
        ) -> Tensor:
            kv, rules = self._layers[layer], self._rules[layer]
            _store(queries, keys, values, rotation, kv, rows)
            # Padding is computed like any row, so it must be numbers.
            make = torch.zeros if rows.padded else torch.empty
            out = make(queries.shape, dtype=queries.dtype, device=queries.device)
            if rows.decoding:
                _decode(queries, kv, rules, rows.decoding, out)
            if rows.chunks:
                _prefill(queries, keys, values, kv, rules, rows.chunks, out)
            return out

        return attend


def _store(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
    kv: PagedKv,
    rows: StepRows,
) -> None:
    """Turn queries in place, and keys on their way into the pool; those of chunks in place, too,
    as they are attended to from where they are.
    """
    cos, sin = (rotation.cos, rotation.sin) if rotation else (None, None)
    options = {
        "interleaved": rotation.interleaved if rotation else False,
        "keep_keys": rows.chunks is not None,
    }
    if kv.key_scales is None or kv.value_scales is None:
        rotate_and_store(
            queries, keys, values, cos, sin, kv.keys, kv.values, rows.kv_rows, **options
        )
    else:
        rotate_and_store_codes(
            queries,
            keys,
            values,
            cos,
            sin,
            kv.keys,
            kv.values,
            kv.key_scales,
            kv.value_scales,
            rows.kv_rows,
            **options,
        )


def _decode(
    queries: Tensor, kv: PagedKv, rules: AttentionRules, decoding: Decoding, out: Tensor
) -> None:
    count = len(decoding.lengths)
    paged_decode(
        queries[:count],
        kv.keys,
        kv.values,
        decoding.page_table,
        decoding.lengths,
        out[:count],
        plan=decoding.plans[rules.window],
        **_options(kv, rules),
    )


def _prefill(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kv: PagedKv,
    rules: AttentionRules,
    chunks: Chunks,
    out: Tensor,
) -> None:
    # Codes are attended to as codes by everybody who comes after: so here.
    plain = kv.key_scales is None
    paged_prefill(
        queries,
        kv.keys,
        kv.values,
        chunks.page_table,
        chunks.row_starts,
        chunks.lengths,
        out,
        new_keys=keys if plain else None,
        new_values=values if plain else None,
        **_options(kv, rules),
    )


def _options(kv: PagedKv, rules: AttentionRules) -> dict[str, Any]:
    return {
        "scale": rules.scale,
        "window": rules.window,
        "soft_cap": rules.soft_cap,
        "slopes": rules.slopes,
        "sinks": rules.sinks,
        "key_scales": kv.key_scales,
        "value_scales": kv.value_scales,
    }
