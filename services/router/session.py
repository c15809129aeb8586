"""One request's stay on one decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.router.decode_client import DecodeLink
from services.router.stream import OutputStream
from splitserve import wire
from splitserve.errors import SplitserveError
from splitserve.sampling import FinishReason
from splitserve.v1 import common_pb2, decode_pb2

_TOKEN_BYTES = 8
"""About what a token takes in a message."""


class DecodeSession:
    """Carries the worker's news into the client's stream until all choices have ended.

    `on_joined` is called once, when every choice that goes on has had news: the prompt's KV is
    then in the worker's own pool. `done` ends with the request's last token or with the failure.
    """

    def __init__(
        self,
        link: DecodeLink,
        name: str,
        stream: OutputStream,
        on_joined: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._link = link
        self._stream = stream
        self._on_joined = on_joined
        self._absent = {choice.index for choice in stream.choices if not choice.finished}
        # Choices that the worker still has.
        self._there = set(self._absent)

    @property
    def failed(self) -> bool:
        """Whether the decode worker was lost or gave the request up."""
        done = self.done
        return done.done() and not done.cancelled() and done.exception() is not None

    def on_delta(self, delta: decode_pb2.SequenceDelta) -> None:
        """Pass one choice's news on."""
        if self.done.done():
            return
        if delta.HasField("error"):
            self._there.discard(delta.choice)
            self.fail(wire.error_from_proto(delta.error))
            return
        reason = wire.finish_reason_from_proto(delta.finish_reason)
        if reason is not None:
            self._there.discard(delta.choice)
        if delta.cached_tokens and delta.choice == 0:
            self._stream.record.found_on_decode(delta.cached_tokens)
        self._push(delta.choice, delta.first_token_index, delta.tokens, reason, delta.ByteSize())

    def on_token(self, choice: int, token_index: int, token_id: int) -> None:
        """Pass one more token of a choice that goes on."""
        if not self.done.done():
            token = common_pb2.Token(id=token_id)
            self._push(choice, token_index, (token,), None, _TOKEN_BYTES)

    def _push(
        self,
        choice: int,
        first_token_index: int,
        tokens: Sequence[common_pb2.Token],
        reason: FinishReason | None,
        size_bytes: int,
    ) -> None:
        try:
            ended_here = self._stream.push(choice, first_token_index, tokens, reason, size_bytes)
        except SplitserveError as error:
            self.fail(error)
            return
        if ended_here:
            self.cancel_choice(choice)
        self._has_come(choice)
        self.settle()

    def on_lost(self, error: SplitserveError) -> None:
        """The worker is gone."""
        self._there.clear()
        self.fail(error)

    def cancel_choice(self, choice: int) -> None:
        """A choice has ended here that the worker would go on with."""
        if choice in self._there:
            self._there.discard(choice)
            self._link.cancel_choice(self.name, choice)
            self._has_come(choice)

    def settle(self) -> None:
        """End `done` if all choices have ended."""
        if self._stream.finished and not self.done.done():
            self.done.set_result(None)

    def _has_come(self, choice: int) -> None:
        """It needs nothing of the prefill tier any more."""
        if self._absent:
            self._absent.discard(choice)
            if not self._absent:
                self._on_joined()

    def fail(self, error: SplitserveError) -> None:
        """End `done` with a failure."""
        if not self.done.done():
            self.done.set_exception(error)

    def close(self) -> None:
        """Leave the worker, which drops whatever it still has of the request. Idempotent."""
        self._link.leave(self.name, finished=not self._there)
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()
