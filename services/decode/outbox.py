"""What a worker has yet to tell one router, merged so that it stays small."""

from __future__ import annotations

import asyncio

from splitserve.errors import Overloaded
from splitserve.v1 import decode_pb2


class Outbox:
    """News of one router's sequences, at most one entry a request and choice.

    While the router reads, an entry is the news of one step. While it does not, entries grow by
    merging, so that the backlog is bounded by its tokens and not by the steps that passed.
    Used on the event loop only.
    """

    def __init__(self, max_pending_tokens: int) -> None:
        self._max_pending_tokens = max_pending_tokens
        self._pending: dict[tuple[str, int], decode_pb2.SequenceDelta] = {}
        self._num_tokens = 0
        self._step = 0
        self._woken = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """Pending entries."""
        return len(self._pending)

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
        waiting = self._pending.get(key)
        if waiting is None:
            self._pending[key] = delta
            self._num_tokens += 1 + len(delta.tokens)
        elif not waiting.finish_reason and not waiting.HasField("error"):
            _extend(waiting, delta)
            self._num_tokens += len(delta.tokens)
        self._woken.set()

    def forget(self, request_id: str, choice: int) -> None:
        """Drop what waits of a choice that the router has cancelled."""
        dropped = self._pending.pop((request_id, choice), None)
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
        while not self._pending and not self._closed:
            self._woken.clear()
            await self._woken.wait()
        if self.overfull:
            raise Overloaded(
                f"the router left more than {self._max_pending_tokens} tokens unread; "
                "read faster or attach again"
            )
        if not self._pending:
            return None
        message = decode_pb2.AttachResponse(step=self._step, deltas=self._pending.values())
        self._pending.clear()
        self._num_tokens = 0
        return message


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
