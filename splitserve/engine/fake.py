"""An engine whose every answer can be checked by hand.

The KV of a token is the pair (token id + 1, position), written once a layer. The next token is

    (sum over all positions p of (p + 1) * token[p]) mod vocab_size

read back from the pages, not from the request: a page that is missing, stale or another
sequence's gives another token or an error. For example, with vocab_size 100, the prompt [3, 5] is
followed by 3*1 + 5*2 = 13, then by 13 + 13*3 = 52. A draw with a temperature above 0 adds
`seed + 7 * choice + 3 * index`. The log-probability of token t is -(t mod 8) / 8.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from splitserve.engine.protocol import Draw, DrawnToken, EngineSpec, LayersDone, Logprob, Slice

_ENTRY = 2  # (token id + 1, position), each a uint32


class FakeEngine:
    """Implements `Engine` with sums. `step_s` stands in for the time a device would take."""

    def __init__(
        self,
        *,
        vocab_size: int = 1000,
        max_context_tokens: int = 4096,
        num_pages: int = 256,
        num_layers: int = 4,
        layer_group: int = 2,
        block_tokens: int = 16,
        eos_token_ids: frozenset[int] = frozenset({0}),
        step_s: float = 0.0,
    ) -> None:
        shape = f"fake-1 {vocab_size} {num_layers} {block_tokens}"
        self.spec = EngineSpec(
            fingerprint=hashlib.sha256(shape.encode()).digest(),
            vocab_size=vocab_size,
            max_context_tokens=max_context_tokens,
            eos_token_ids=eos_token_ids,
            num_layers=num_layers,
            layer_group=layer_group,
            block_tokens=block_tokens,
            block_bytes=num_layers * block_tokens * _ENTRY * 4,
            num_pages=num_pages,
        )
        self._step_s = step_s
        self._pool: NDArray[np.uint32] = np.frombuffer(
            self._memory(num_pages * self.spec.block_bytes), np.uint32
        ).reshape(num_pages, num_layers, block_tokens, _ENTRY)

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """See `Engine.step`."""
        if self._step_s:
            time.sleep(self._step_s)
        group = self.spec.layer_group
        for first in range(0, self.spec.num_layers, group):
            end = min(first + group, self.spec.num_layers)
            for part in slices:
                self._write(part, first, end)
            if layers_done:
                layers_done(first, end)
        return [self._draw_all(part) for part in slices]

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        out[:] = self._pool[page, first_layer:end_layer].tobytes()

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`."""
        self._pool[page] = np.frombuffer(content, np.uint32).reshape(self._pool[page].shape)

    def close(self) -> None:
        """See `Engine.close`."""

    def _memory(self, size_bytes: int) -> bytearray | mmap.mmap:
        """What the pool lies in: zeros."""
        return bytearray(size_bytes)

    def _write(self, part: Slice, first_layer: int, end_layer: int) -> None:
        block = self.spec.block_tokens
        for offset, token in enumerate(part.token_ids):
            position = part.start + offset
            page = part.pages[position // block]
            self._pool[page, first_layer:end_layer, position % block] = (token + 1, position)

    def _draw_all(self, part: Slice) -> list[DrawnToken]:
        if not part.draws:
            return []
        total = self._context_sum(part)
        return [self._draw(draw, total) for draw in part.draws]

    def _context_sum(self, part: Slice) -> int:
        length = part.start + len(part.token_ids)
        pages = list(part.pages[: -(-length // self.spec.block_tokens)])
        entries = self._pool[pages].transpose(1, 0, 2, 3).reshape(self.spec.num_layers, -1, _ENTRY)
        entries = entries[:, :length].astype(np.int64)
        positions = np.arange(length)
        if (entries != entries[0]).any() or (entries[0, :, 1] != positions).any():
            # Wrong KV must show in the tokens, whatever part of it is wrong.
            return int(entries.sum()) + 1
        return int(((entries[0, :, 0] - 1) * (positions + 1)).sum())

    def _draw(self, draw: Draw, total: int) -> DrawnToken:
        token = next_token(total, draw, self.spec.vocab_size)
        if draw.params.logprobs is None:
            return DrawnToken(token)
        top = tuple(
            Logprob(t, fake_logprob(t))
            for t in ((token + i) % self.spec.vocab_size for i in range(draw.params.logprobs))
        )
        return DrawnToken(token, fake_logprob(token), top)


def next_token(total: int, draw: Draw, vocab_size: int) -> int:
    """The token after a context whose weighted sum is `total`."""
    if not draw.params.greedy:
        total += draw.seed + 7 * draw.choice + 3 * draw.output_index
    token = total % vocab_size
    if draw.output_index < draw.params.min_tokens and token == 0:
        return 1
    return token


def fake_logprob(token_id: int) -> float:
    """The log-probability that the fake engine reports for a token, exact in float32."""
    value: float = struct.unpack("<f", struct.pack("<f", -(token_id % 8) / 8))[0]
    return value


def expected_tokens(
    prompt: Sequence[int], count: int, vocab_size: int = 1000, *, seed: int | None = None
) -> list[int]:
    """The first `count` tokens after `prompt`, ends of sequence ignored.

    Without `seed` the greedy ones, with it those of choice 0 at a temperature above 0.
    """
    tokens: list[int] = []
    total = sum((position + 1) * token for position, token in enumerate(prompt))
    for index in range(count):
        drawn = total if seed is None else total + seed + 3 * index
        tokens.append(drawn % vocab_size)
        total += (len(prompt) + index + 1) * tokens[-1]
    return tokens
