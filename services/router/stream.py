"""What one client is still to be told.

Tokens are put in by plain calls as they come from the workers and taken out, merged into one
message, whenever the client's connection can take the next one. A client that reads slowly gets
fewer and larger messages; one that falls too far behind is given up, so that memory is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.router.choice import ChoiceOutput, TextStream
from services.router.record import RequestRecord
from services.router.request import Request
from splitserve import wire
from splitserve.errors import Overloaded, WorkerLost
from splitserve.sampling import FinishReason
from splitserve.v1 import common_pb2, decode_pb2, inference_pb2


class SlowClient(Overloaded):
    """The client takes its output in too slowly; another worker would not help."""


class OutputStream:
    """All choices of one request between the workers and the client.

    `on_fail` is called once, when the stream has failed, and must not wait. `model_fingerprint`
    is of the model that the tokens are of: nothing else may go on with them.
    """

    def __init__(
        self,
        request: Request,
        texts: Sequence[TextStream],
        record: RequestRecord,
        max_pending_bytes: int,
        on_fail: Callable[[], None] = lambda: None,
    ) -> None:
        self.record = record
        self.choices = [ChoiceOutput(index, text) for index, text in enumerate(texts)]
        self.error: BaseException | None = None
        self.model_fingerprint = b""
        self._request = request
        self._unfinished = len(self.choices)
        self._pending: dict[int, inference_pb2.ChoiceDelta] = {}
        self._pending_bytes = 0
        self._max_pending_bytes = max_pending_bytes
        self._on_fail = on_fail
        self._wake = asyncio.Event()
        self._first_message = True
        self._last_taken = False

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return self._unfinished == 0

    @property
    def started(self) -> bool:
        """Whether any token has come."""
        return any(choice.token_ids for choice in self.choices)

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the client."""
        return self._pending_bytes

    def push(
        self,
        index: int,
        first_token_index: int,
        tokens: Sequence[common_pb2.Token],
        reason: FinishReason | None,
        size_bytes: int,
    ) -> bool:
        """Put new tokens of one choice in. `size_bytes` is about what they take.

        Returns True if the choice has ended here but not on its worker, by a stop text. Raises
        WorkerLost for tokens that cannot be right, and SlowClient if the client is too far
        behind.
        """
        if index >= len(self.choices):
            raise WorkerLost(f"the worker spoke of choice {index} of {len(self.choices)}")
        choice = self.choices[index]
        if choice.finished:
            return False
        kept, text, ended = choice.take(first_token_index, tokens, reason)
        self._merge(
            index, first_token_index, tokens if kept == len(tokens) else tokens[:kept], text
        )
        self._pending_bytes += size_bytes + len(text)
        if kept:
            self.record.tokens_came(index, kept)
        if ended:
            self._end(choice)
        self._wake.set()
        if self._pending_bytes > self._max_pending_bytes:
            raise SlowClient(
                f"the client reads too slowly: {self._pending_bytes} bytes wait for it"
            )
        return ended and reason is None

    def fail(self, error: BaseException) -> None:
        """No more will come. What is pending is still handed out, then `error` is raised."""
        if self.error is None and not self.finished:
            self.error = error
            self._wake.set()
            self._on_fail()

    async def next_message(self) -> inference_pb2.GenerateResponse | None:
        """The next message as soon as there is news; None after the last. Raises the failure."""
        while not self._pending:
            if self.error is not None:
                raise self.error
            if self._last_taken:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._take()

    def progress(self) -> list[decode_pb2.ChoiceProgress]:
        """All output so far, for another worker to go on from."""
        return [
            decode_pb2.ChoiceProgress(
                index=choice.index,
                token_ids=choice.token_ids,
                finished=choice.finished,
            )
            for choice in self.choices
        ]

    def _merge(
        self, index: int, first_token_index: int, tokens: Sequence[common_pb2.Token], text: str
    ) -> None:
        pending = self._pending.get(index)
        if pending is None:
            pending = inference_pb2.ChoiceDelta(index=index, first_token_index=first_token_index)
            self._pending[index] = pending
        pending.tokens.extend(tokens)
        if text:
            pending.text += text

    def _end(self, choice: ChoiceOutput) -> None:
        self._unfinished -= 1
        self._pending[choice.index].finish_reason = wire.finish_reason_to_proto(
            choice.finish_reason
        )
        if self.finished:
            self.record.finished(self.choices)

    def _take(self) -> inference_pb2.GenerateResponse:
        message = inference_pb2.GenerateResponse(
            request_id=self._request.id, choices=self._pending.values()
        )
        self._pending.clear()
        self._pending_bytes = 0
        if self._first_message:
            self._first_message = False
            message.seed = self._request.sampling.seed or 0
        if self.finished:
            self._last_taken = True
            message.usage.CopyFrom(self.record.usage())
            message.timings.CopyFrom(self.record.timings())
        return message
