"""One client's stream, from its message to its last token.

1. Validate and tokenise (`intake`).
2. Wait for admission, or be refused (`admission`).
3. Start the request's way through the tiers (`dispatch`) as a task that fills an `OutputStream`.
4. Write what comes to the client, one message at a time.
5. At the end, on cancel and on error alike: end that task, which frees everything on all tiers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from services.router.admission import Admission, Ticket
from services.router.dispatch import Dispatcher
from services.router.intake import Intake
from services.router.record import RequestRecord
from services.router.request import Request
from services.router.stream import OutputStream
from services.router.tokenization import PromptEncoder
from splitserve.errors import DeadlineExceeded, Overloaded, SplitserveError, Unavailable
from splitserve.obs import names
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing
from splitserve.v1 import inference_pb2

_log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
LINGER_S = 0.2
"""How long a stream that has failed may go on writing what was pending."""

Write = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]
"""Sends one message to the client; returns when the connection takes the next."""


class Generation:
    """Serves requests. One object for all of them."""

    def __init__(
        self,
        intake: Intake,
        encoder: PromptEncoder,
        admission: Admission,
        dispatcher: Dispatcher,
        metrics: Metrics,
        tracing: Tracing,
        model_name: str,
        *,
        max_pending_bytes: int,
    ) -> None:
        self._intake = intake
        self._encoder = encoder
        self._admission = admission
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._tracing = tracing
        self._model_name = model_name
        self._max_pending_bytes = max_pending_bytes
        self.num_open = 0

    async def serve(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        timeout_s: float,
        write: Write,
    ) -> None:
        """Answer one request by `write`. Raises the error that ends it early.

        Whatever happens, it has ended within `timeout_s`.
        """
        now = asyncio.get_running_loop().time()
        deadline_s = now + timeout_s
        stream: OutputStream | None = None
        self.num_open += 1
        try:
            async with asyncio.timeout_at(deadline_s) as limit:
                request = await self._take_in(message, tenant, now, deadline_s)
                async with self._admitted(request) as ticket:
                    stream = self._open_stream(request, ticket, limit)
                    try:
                        await self._relay(request, stream, write)
                    finally:
                        stream.record.close()
        except TimeoutError:
            if stream is not None and stream.error is not None:
                raise stream.error from None
            raise DeadlineExceeded(f"the request did not end within {timeout_s:.3f} s") from None
        finally:
            self.num_open -= 1

    async def _take_in(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        received_s: float,
        deadline_s: float,
    ) -> Request:
        if self.num_open > self._admission.capacity:
            # More than could be admitted are being tokenised already.
            raise Overloaded("too many requests are open; retry later", RETRY_AFTER_S)
        self._admission.refuse_if_full()
        with self._tracing.tracer.start_as_current_span(names.SPAN_TOKENIZE):
            return await self._intake.request(message, tenant, received_s, deadline_s)

    @contextlib.asynccontextmanager
    async def _admitted(self, request: Request) -> AsyncIterator[Ticket]:
        with self._tracing.tracer.start_as_current_span(names.SPAN_QUEUE):
            admitting = self._admission.admit(len(request.prompt))
            self._count_load()
            ticket = await admitting
        self._count_load()
        try:
            yield ticket
        finally:
            ticket.release()
            self._count_load()

    def _open_stream(
        self, request: Request, ticket: Ticket, limit: asyncio.Timeout
    ) -> OutputStream:
        loop = asyncio.get_running_loop()

        def stop_writing() -> None:
            limit.reschedule(min(request.deadline_s, loop.time() + LINGER_S))

        texts = self._encoder.texts(
            request.sampling, keep_special_tokens=request.keep_special_tokens
        )
        record = RequestRecord(request, ticket, self._metrics, self._model_name)
        return OutputStream(request, texts, record, self._max_pending_bytes, stop_writing)

    async def _relay(self, request: Request, stream: OutputStream, write: Write) -> None:
        driver = asyncio.create_task(self._drive(request, stream))
        try:
            while (message := await stream.next_message()) is not None:
                await write(message)
        finally:
            driver.cancel()
            # Its cleanup does not wait for anybody, so neither does this for long.
            await asyncio.wait({driver})

    async def _drive(self, request: Request, stream: OutputStream) -> None:
        try:
            await self._dispatcher.run(request, stream)
        except Exception as error:
            if not isinstance(error, SplitserveError):
                _log.exception("a request failed by a fault of the router")
            elif isinstance(error, Unavailable) or type(error) is SplitserveError:
                _log.warning("a request failed: %s", error.message)
            stream.fail(error)

    def _count_load(self) -> None:
        self._metrics.num_requests_running.set(self._admission.running)
        self._metrics.num_requests_waiting.set(self._admission.waiting)
