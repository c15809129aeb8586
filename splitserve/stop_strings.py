"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string is complete; the stop string itself is never passed on.

    What could still be the beginning of a stop string is held back. Of several stop strings the
    one that is complete first wins, the longest of those that end together. So the outcome does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("an empty stop string would stop every output at once")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes the next piece, returns what may now be passed on."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        # `_held` starts no complete stop string, so each first match found is a new one.
        candidate = self._held + text
        cut = self._first_match(candidate)
        if cut is not None:
            self.stopped, self._held = True, ""
            return candidate[:cut]
        hold_from = self._first_possible_start(candidate)
        self._held = candidate[hold_from:]
        return candidate[:hold_from]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _first_possible_start(self, text: str) -> int:
        """The earliest index from which the rest of `text` is the beginning of a stop string."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first
