"""One prompt on a prefill worker, from its receipt until its pages are free again."""

from __future__ import annotations

import asyncio

import grpc
from opentelemetry.context import Context

from services.prefill.hand_over import HandOver
from services.prefill.recorder import Recorder
from splitserve.engine.core import EngineCore
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.errors import DeadlineExceeded
from splitserve.kv.receipt import KvReceipt
from splitserve.worker.block_loader import BlockLoader
from splitserve.worker.relay import OutputRelay, Step

RECEIPT_WITHIN_S = 0.01
"""So long the first tokens may wait for the digests of the last blocks. Then they go without a
receipt, and the decode worker hears of the blocks from the store.
"""


class Job:
    """Ends in exactly one way: `first_tokens` returns or raises; then `close` frees everything."""

    def __init__(
        self,
        request_id: str,
        sequence: Sequence,
        *,
        core: EngineCore,
        relay: OutputRelay,
        recorder: Recorder,
        parent: Context,
        hand_over: HandOver | None,
        loader: BlockLoader | None,
    ) -> None:
        self.sequence = sequence
        self._request_id = request_id
        self._core = core
        self._relay = relay
        self._recorder = recorder
        self._parent = parent
        self._hand_over = hand_over
        self._loader = loader
        self._code = grpc.StatusCode.CANCELLED
        self._done: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()

    async def first_tokens(self, timeout_s: float | None) -> SequenceOutput:
        """Compute the prompt and draw the first token of every choice.

        Raises:
            Overloaded: the queue is full, or the prompt can never fit the pool.
            DeadlineExceeded: `timeout_s` passed first.
        """
        self._relay.subscribe(self.sequence.id, self._on_output)
        self._core.submit(self.sequence)
        try:
            async with asyncio.timeout(timeout_s):
                output = await self._done
        except TimeoutError:
            self._code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise DeadlineExceeded("the deadline passed before the prompt was computed") from None
        if output.error:
            self._code = output.error.code
            raise output.error
        self._code = grpc.StatusCode.OK
        return output

    async def receipt(self) -> KvReceipt | None:
        """What the decode worker may read in this worker's pool, to be sent with the tokens."""
        return await self._hand_over.receipt(RECEIPT_WITHIN_S) if self._hand_over else None

    async def close(self) -> None:
        """Stop what still runs, unless it is the hand-over of a computed prompt; free the pages."""
        self._relay.unsubscribe(self.sequence.id)
        if self._code is not grpc.StatusCode.OK:
            self._core.abort(self.sequence.id)
            if self._hand_over:
                self._hand_over.cancel()
        try:
            if self._loader:
                self._loader.cancel(self.sequence.id)
                await self._loader.ended()
            if self._hand_over:
                await self._hand_over.ended()
        finally:
            self._core.release(self.sequence.id)
            self._record()

    def _on_output(self, _: Step, output: SequenceOutput) -> None:
        if self._hand_over and output.prefill_done:
            self._hand_over.complete()
        if not self._done.done():
            self._done.set_result(output)

    def _record(self) -> None:
        self._recorder.ended(
            self._request_id,
            self.sequence,
            self._parent,
            self._code,
            self._loader.stats if self._loader else None,
            self._hand_over.stats if self._hand_over else None,
        )
