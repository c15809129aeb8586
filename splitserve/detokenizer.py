"""Token ids to text as they come, in constant work a token.

A token's text can depend on its neighbours: a character may be spread over several tokens, and
some decoders drop a leading space. So tokens are decoded in a short window: those of the last
piece that was passed on, for context, and those that are not complete yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from splitserve.stop_strings import StopMatcher
from splitserve.tokenizer import Tokenizer

_REPLACEMENT: Final = "\ufffd"
# A character has at most four bytes and a token at least one. More pending tokens than this are
# not one unfinished character but bytes that are no text.
_MOST_PENDING: Final = 8


@dataclass(frozen=True)
class TextDelta:
    """New text. `stopped` says that a stop string was found and the output ends before it.

    `num_tokens` counts the pushed tokens up to and with the one that completed the stop string;
    without a stop it is all of them.
    """

    text: str
    stopped: bool
    num_tokens: int


class IncrementalDetokenizer:
    """Detokenises one output.

    All deltas and the result of `finish` join to what decoding the whole output at once gives, up
    to the first stop string. No delta ends in half a character or may be taken back.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stops = StopMatcher(stop)
        # The window: `_context` has been passed on whole and decodes to `_context_text`;
        # `_pending` follows it, and `_passed_on` characters of its text are out already.
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._passed_on = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.stopped

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes the next tokens. After a stop string has been found it takes no more."""
        pieces: list[str] = []
        num_tokens = 0
        for token_id in token_ids:
            if self._stops.stopped:
                break
            num_tokens += 1
            pieces.append(self._stops.push(self._take(token_id)))
        return TextDelta("".join(pieces), self._stops.stopped, num_tokens)

    def finish(self) -> str:
        """What is left: text that could have begun a stop string, and an unfinished character."""
        rest = self._stops.push(self._pending_text()[self._passed_on :])
        self._advance(len(self._pending))
        return rest + self._stops.flush()

    def _take(self, token_id: int) -> str:
        """One more token; the text that has become certain by it."""
        if not self._adds_text(token_id):
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        certain = text.rstrip(_REPLACEMENT)
        if len(certain) == len(text):
            new = text[self._passed_on :]
            self._advance(len(self._pending))
            return new
        if len(self._pending) > _MOST_PENDING:
            return self._give_up_on_oldest(text)
        new = certain[self._passed_on :]
        self._passed_on = max(self._passed_on, len(certain))
        return new

    def _adds_text(self, token_id: int) -> bool:
        # Without these the context always decodes to some text, which keeps leading spaces.
        if self._skip_special_tokens and token_id in self._tokenizer.special_ids:
            return False
        return self._tokenizer.has_token(token_id)

    def _pending_text(self) -> str:
        """The text of the pending tokens where they stand."""
        return self._decode(self._context + self._pending)[len(self._context_text) :]

    def _advance(self, num_tokens: int) -> None:
        """Makes the oldest pending tokens, passed on whole, the new context."""
        if num_tokens == 0:
            return
        self._context = self._pending[:num_tokens]
        self._context_text = self._decode(self._context)
        self._pending = self._pending[num_tokens:]
        self._passed_on = 0

    def _give_up_on_oldest(self, text: str) -> str:
        """Passes on the fewest oldest tokens whose text no later token can change."""
        for count in range(1, len(self._pending)):
            oldest = self._decode(self._context + self._pending[:count])[len(self._context_text) :]
            newest = self._decode(self._pending[count:])
            # Were the cut inside a character, its halves would decode to more than the whole.
            if oldest + newest == text:
                new = oldest[self._passed_on :]
                already = max(0, self._passed_on - len(oldest))
                self._advance(count)
                self._passed_on = already
                return new
        new = text[self._passed_on :]
        self._advance(len(self._pending))
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)
