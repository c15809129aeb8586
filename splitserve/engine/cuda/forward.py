"""One step on the device: from the numbers of `layout` to logits and the likeliest tokens.

Launches depend on the step's shape alone, never on what the numbers say, so that a step can be
recorded as a CUDA graph and replayed with other numbers in the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from splitserve_kernels.argmax import argmax_rows
from torch import Tensor

from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.triton_attention import Chunks, Decoding, StepRows, TritonAttention
from splitserve.models.decoder import Decoder


class Forward:
    """Computes steps over one model, one pool and one slot table."""

    def __init__(
        self, model: Decoder, memory: PageMemory, attention: TritonAttention, slots: SlotTable
    ) -> None:
        self.model = model
        self._memory = memory
        self._attention = attention
        self._slots = slots

    def __call__(
        self,
        shape: StepShape,
        numbers: Tensor,
        layer_done: Callable[[int], None] | None = None,
        *,
        padded: bool = False,
    ) -> Tensor:
        """Logits of each slot and then of each chunk's last row, (slots + chunks, vocab_size).

        The likeliest token of each is its slot's token afterwards. `padded`: the step may have
        fewer chunk rows than the shape.
        """
        *_, starts, _, chunk_slots = (numbers[part] for part in shape.sections)
        wanted = None
        if shape.chunks:
            slots = torch.arange(shape.slots, device=numbers.device)
            wanted = torch.cat((slots, starts[1:] - 1))
        hidden = self.hidden(shape, numbers, layer_done, wanted, padded=padded)
        logits = self.model.scores(hidden)
        drawn = argmax_rows(logits)
        # A slot that is a chunk's has a row of nobody, too: the chunk's token must stay.
        self._slots.tokens[: shape.slots] = drawn[: shape.slots]
        if shape.chunks:
            self._slots.tokens.index_copy_(0, chunk_slots, drawn[shape.slots :])
        return logits

    def hidden(
        self,
        shape: StepShape,
        numbers: Tensor,
        layer_done: Callable[[int], None] | None = None,
        wanted: Tensor | None = None,
        *,
        padded: bool = False,
    ) -> Tensor:
        """Normalised hidden states, (slots + rows, hidden_size), or of the rows `wanted`; keys and
        values go to the pool.
        """
        tokens, positions, row_slots, starts, lengths, chunk_slots = (
            numbers[part] for part in shape.sections
        )
        slots, block = self._slots, self._memory.block_tokens
        row_slots = torch.cat((torch.arange(shape.slots, device=numbers.device), row_slots))
        tokens = torch.where(tokens < 0, slots.tokens[row_slots], tokens)
        slots.fed[: shape.slots] = tokens[: shape.slots]
        places = positions.clamp(min=0)
        pages = slots.pages[row_slots, places // block].long()
        rows = StepRows(
            kv_rows=torch.where(positions < 0, -1, pages * block + places % block),
            decoding=self._decoding(positions[: shape.slots]) if shape.slots else None,
            chunks=Chunks(slots.pages[chunk_slots], starts, lengths) if shape.chunks else None,
            padded=padded,
        )
        attend = self._attention.over(rows)
        return self.model.hidden(tokens, places, attend, layer_done, wanted)

    def _decoding(self, positions: Tensor) -> Decoding:
        lengths = (positions + 1).to(torch.int32)
        return Decoding(
            self._slots.pages[: len(positions)], lengths, self._attention.plans(lengths)
        )
