"""What the device knows of the sequences in the batch: their pages and last drawn tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from splitserve_kernels.slot_news import apply_slot_news
from torch import Tensor

from splitserve.engine.cuda.layout import Numbers
from splitserve.engine.protocol import Slice

_LINE_PAGES = 64


@dataclass(frozen=True)
class SlotNews:
    """What of a step's sequences the device does not know yet."""

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    """Slots whose tokens move, and where to."""
    places: list[int] = field(default_factory=list)
    page_numbers: list[int] = field(default_factory=list)
    """Places in the flattened table of pages, and the page numbers that are due there."""

    @property
    def size(self) -> int:
        """Numbers in all."""
        return 2 * len(self.before) + 2 * len(self.places)

    def lay_out(self, out: Numbers) -> None:
        """Fill `out`, (size,)."""
        out[:] = [*self.before, *self.after, *self.places, *self.page_numbers]


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

    def news(
        self, slices: Iterable[Slice], block_tokens: int, moves: Iterable[tuple[int, int]] = ()
    ) -> SlotNews:
        """What a step of these slices needs, booked as sent; `moves` are (before, after) slots.
        Raises `ValueError` for a sequence that is longer than a row.
        """
        news = SlotNews()
        for before, after in moves:
            news.before.append(before)
            news.after.append(after)
        for part in slices:
            known, sent = self._sent[part.slot]
            needed = -(-(part.start + len(part.token_ids)) // block_tokens)
            if needed > self._max_pages:
                raise ValueError(f"{needed} pages are more than the context's {self._max_pages}")
            if known is not part.pages:
                sent = 0
            if sent < needed:
                first = part.slot * self._max_pages
                news.places.extend(range(first + sent, first + needed))
                news.page_numbers.extend(part.pages[sent:needed])
            self._sent[part.slot] = (part.pages, max(sent, needed))
        return news

    def apply(self, news: SlotNews, sent: Tensor) -> None:
        """Put news in their places; `sent` is what they were laid out as, on the device."""
        apply_slot_news(self.tokens, self.pages, sent, len(news.before), len(news.places))

    def warm_up(self) -> None:
        """Compile what `apply` launches: pages of nobody and tokens stay as they are."""
        places = [self.nobody * self._max_pages]
        news = SlotNews([self.nobody], [self.nobody], places, [0])
        sent = torch.tensor([self.nobody, self.nobody, *places, 0], device=self.tokens.device)
        self.apply(news, sent)
