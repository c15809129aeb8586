"""One of a request's n outputs, as far as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from splitserve.detokenizer import TextDelta
from splitserve.errors import WorkerLost
from splitserve.sampling import FinishReason
from splitserve.v1 import common_pb2


class TextStream(Protocol):
    """Turns one choice's tokens into text and looks for stop texts in it."""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """The text that is decided by more tokens, and whether a stop text is complete."""
        ...

    def finish(self) -> str:
        """The rest, when no more tokens will come."""
        ...


class NoText:
    """For servers without a tokenizer: tokens only."""

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """No text, and so no stop."""
        return TextDelta("", False, len(token_ids))

    def finish(self) -> str:
        """No text."""
        return ""


class Taken(NamedTuple):
    """What became of new tokens: how many were kept, the text they decide, whether it is over."""

    num_tokens: int
    text: str
    ended: bool


class ChoiceOutput:
    """The tokens of one choice and whether it has ended. Guards that indexes have no gap."""

    __slots__ = ("_text", "finish_reason", "index", "token_ids")

    def __init__(self, index: int, text: TextStream) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text = text

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def take(
        self, first_index: int, tokens: Sequence[common_pb2.Token], reason: FinishReason | None
    ) -> Taken:
        """Append tokens; return what became of them.

        Fewer are kept if a stop text was completed before the last; the choice then ends here.
        Raises WorkerLost if the first one is not the next that is due.
        """
        if first_index != len(self.token_ids):
            raise WorkerLost(
                f"token {first_index} of choice {self.index} came where {len(self.token_ids)} "
                "was due; the worker cannot be trusted with this request"
            )
        token_ids = [token.id for token in tokens]
        delta = self._text.push(token_ids)
        if delta.stopped:
            self.token_ids += token_ids[: delta.num_tokens]
            self.finish_reason = FinishReason.STOP
            return Taken(delta.num_tokens, delta.text, True)
        self.token_ids += token_ids
        if reason is None:
            return Taken(len(token_ids), delta.text, False)
        self.finish_reason = reason
        return Taken(len(token_ids), delta.text + self._text.finish(), True)
