"""What the penalised sequences of a batch have said, kept up as their outputs grow.

Never imports torch: this is the host's part of a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from splitserve.engine.protocol import Draw


class History:
    """Distinct tokens of a prompt and an output, and how often each is in the output."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self._prompt, self._output = prompt, output
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._num_counted = 0
        self.tokens = array("q", self._places)
        self.counts = array("q", bytes(8 * len(self._places)))
        self.follow()

    def __len__(self) -> int:
        return len(self.tokens)

    def is_of(self, draw: Draw) -> bool:
        """Whether the draw goes on with this very output, which has only grown."""
        same = draw.prompt is self._prompt and draw.output is self._output
        return same and len(draw.output) >= self._num_counted

    def follow(self) -> None:
        """Count what the output has had since."""
        news = self._output[self._num_counted :]
        for token in news:
            place = self._places.setdefault(token, len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(token)
                self.counts.append(0)
            self.counts[place] += 1
        self._num_counted += len(news)


class Histories:
    """One for each slot whose sequence is penalised. A slot keeps its own until it has another
    sequence, also while that is preempted.
    """

    def __init__(self) -> None:
        self._of_slots: dict[int, History] = {}

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """Take along those of sequences that have come (from one slot, to another)."""
        taken = [(after, self._of_slots.pop(before, None)) for before, after in moves]
        self._of_slots.update((slot, history) for slot, history in taken if history is not None)

    def of(self, slot: int, draw: Draw) -> History:
        """All tokens that the host knows of; made anew for another sequence, else followed."""
        history = self._of_slots.get(slot)
        if history is not None and history.is_of(draw):
            history.follow()
        else:
            history = self._of_slots[slot] = History(draw.prompt, draw.output)
        return history
