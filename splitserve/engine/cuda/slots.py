"""What the device knows of the sequences in the batch: their pages and last drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitserve.engine.protocol import Slice

_LINE_PAGES = 64


class SlotTable:
    """Rows of pages and a token, one for each slot, and one more for nobody. Rows are padded to
    whole cache lines.

    The host remembers how much of a sequence's pages it has sent, so that a step sends only what
    is new: a page for every `block_tokens`th token.
    """

    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self.num_slots = num_slots
        max_pages = -(-max_pages // _LINE_PAGES) * _LINE_PAGES
        self.pages = torch.zeros((num_slots + 1, max_pages), dtype=torch.int32, device=device)
        self.tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.fed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """The tokens that the last step's decoding rows were computed from."""
        self._max_pages = max_pages
        self._sent: list[tuple[Sequence[int], int]] = [((), 0)] * num_slots

    @property
    def nobody(self) -> int:
        """The slot that no sequence has. Its pages are all page 0 and nothing is read from them."""
        return self.num_slots

    def news(self, slices: Sequence[Slice], block_tokens: int) -> tuple[list[int], list[int]]:
        """Places in the flattened `pages` and the page numbers that are due there, and books them
        as sent. Raises `ValueError` for a sequence that is longer than a row.
        """
        places: list[int] = []
        numbers: list[int] = []
        for part in slices:
            known, sent = self._sent[part.slot]
            needed = -(-(part.start + len(part.token_ids)) // block_tokens)
            if needed > self._max_pages:
                raise ValueError(f"{needed} pages are more than the context's {self._max_pages}")
            if known is not part.pages:
                sent = 0
            if sent < needed:
                first = part.slot * self._max_pages
                places += range(first + sent, first + needed)
                numbers += part.pages[sent:needed]
            self._sent[part.slot] = (part.pages, max(sent, needed))
        return places, numbers

    def move(self, before: Tensor, after: Tensor) -> None:
        """Give slots `after` the tokens that slots `before` have; both int64 on the device. Their
        pages are news.
        """
        self.tokens.index_copy_(0, after, self.tokens[before])

    def write(self, places: Tensor, numbers: Tensor) -> None:
        """Put page numbers where they are due; both int64 on the device."""
        self.pages.view(-1).index_copy_(0, places, numbers.to(torch.int32))
