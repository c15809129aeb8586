"""What a worker has yet to tell one router, merged so that it stays small."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from splitserve.errors import Overloaded
from splitserve.v1 import common_pb2, decode_pb2


class TaggedToken(NamedTuple):
    """One token of a choice that the router has given a tag, and its index in the output."""

    tag: int
    token_index: int
    token_id: int


class Outbox:
    """News of one router's sequences, at most one entry a request and choice.

    While the router reads, an entry is the news of one step, most often a single token. While it
    does not, entries grow by merging, so that the backlog is bounded by its tokens and not by the
    steps that passed. Used on the event loop only.
    """

    def __init__(self, max_pending_tokens: int) -> None:
        self._max_pending_tokens = max_pending_tokens
        self._pending: dict[tuple[str, int], decode_pb2.SequenceDelta] = {}
        # Of others than these.
        self._tokens: dict[tuple[str, int], TaggedToken] = {}
        self._num_tokens = 0
        self._step = 0
        self._woken = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """Pending entries."""
        return len(self._pending) + len(self._tokens)

    @property
    def overfull(self) -> bool:
        """Whether the router has fallen too far behind for the stream to go on."""
        return self._num_tokens > self._max_pending_tokens

    def put(self, step: int, delta: decode_pb2.SequenceDelta) -> None:
        """Add the news of one choice; an entry that waits already is extended.

        After its end nothing is added: what comes then answers a command that crossed the end on
        its way, and the router must hear why the choice ended and not that it has.

        Each entry counts as one token more than it has, so that empty ones are bounded too.
        """
        self._step = max(self._step, step)
        key = (delta.request_id, delta.choice)
        waiting = self._pending.get(key) or self._written_out(key)
        if waiting is None:
            self._pending[key] = delta
            self._num_tokens += 1 + len(delta.tokens)
        elif not waiting.finish_reason and not waiting.HasField("error"):
            _extend(waiting, delta)
            self._num_tokens += len(delta.tokens)
        self._woken.set()

    def put_token(self, step: int, request_id: str, choice: int, token: TaggedToken) -> None:
        """Add a token of a choice that goes on; see `put`."""
        key = (request_id, choice)
        if key in self._pending or key in self._tokens:
            self.put(step, _delta(key, token))
            return
        self._step = max(self._step, step)
        self._tokens[key] = token
        self._num_tokens += 2
        self._woken.set()

    def forget(self, request_id: str, choice: int) -> None:
        """Drop what waits of a choice that the router has cancelled."""
        key = (request_id, choice)
        if self._tokens.pop(key, None) is not None:
            self._num_tokens -= 2
        dropped = self._pending.pop(key, None)
        if dropped is not None:
            self._num_tokens -= 1 + len(dropped.tokens)

    def close(self) -> None:
        """End the stream once all that waits was taken."""
        self._closed = True
        self._woken.set()

    async def take(self) -> decode_pb2.AttachResponse | None:
        """Wait for news and take all of it; None after `close` once nothing is left.

        Raises:
            Overloaded: more was pending than a router may leave unread.
        """
        while not len(self) and not self._closed:
            self._woken.clear()
            await self._woken.wait()
        if self.overfull:
            raise Overloaded(
                f"the router left more than {self._max_pending_tokens} tokens unread; "
                "read faster or attach again"
            )
        if not len(self):
            return None
        message = decode_pb2.AttachResponse(step=self._step, deltas=self._pending.values())
        if self._tokens:
            tags, indexes, ids = zip(*self._tokens.values(), strict=True)
            message.tokens.tags.extend(tags)
            message.tokens.token_indexes.extend(indexes)
            message.tokens.token_ids.extend(ids)
        self._pending.clear()
        self._tokens.clear()
        self._num_tokens = 0
        return message

    def _written_out(self, key: tuple[str, int]) -> decode_pb2.SequenceDelta | None:
        """The entry of a choice of which a single token waits, now one that can grow."""
        token = self._tokens.pop(key, None)
        if token is None:
            return None
        delta = self._pending[key] = _delta(key, token)
        return delta


def _delta(key: tuple[str, int], token: TaggedToken) -> decode_pb2.SequenceDelta:
    request_id, choice = key
    return decode_pb2.SequenceDelta(
        request_id=request_id,
        choice=choice,
        first_token_index=token.token_index,
        tokens=[common_pb2.Token(id=token.token_id)],
    )


def _extend(waiting: decode_pb2.SequenceDelta, later: decode_pb2.SequenceDelta) -> None:
    """Append `later`, which goes on where `waiting` ends."""
    if not waiting.tokens:
        waiting.first_token_index = later.first_token_index
    waiting.tokens.extend(later.tokens)
    waiting.cached_tokens = waiting.cached_tokens or later.cached_tokens
    if later.finish_reason:
        waiting.finish_reason = later.finish_reason
    if later.HasField("error"):
        waiting.error.CopyFrom(later.error)
