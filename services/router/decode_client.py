"""One `Attach` stream a decode worker, shared by all requests that run there.

Commands are queued and written by one task; news are read by another and handed to each
request's session by a plain call, so that a token costs neither a task nor a wake-up here. When
the stream breaks every session on it is told at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import deque
from collections.abc import Collection
from typing import Protocol

import grpc

from services.router.workers import Worker
from splitserve.errors import SplitserveError, WorkerLost
from splitserve.v1 import common_pb2, decode_pb2, decode_pb2_grpc

_log = logging.getLogger(__name__)


class Session(Protocol):
    """What a request is told by the decode worker. The methods must not wait or raise."""

    def on_delta(self, delta: decode_pb2.SequenceDelta) -> None:
        """News of one choice."""
        ...

    def on_token(self, choice: int, token_index: int, token_id: int) -> None:
        """One more token of a choice that goes on."""
        ...

    def on_lost(self, error: SplitserveError) -> None:
        """The stream broke: nothing more will come."""
        ...


class DecodeLink:
    """The stream to one worker. Opened by `attach`, gone for good once it has broken."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.broken = False
        self._sessions: dict[str, Session] = {}
        # Of each tag that the worker may use for a choice: whose it is, and which.
        self._tagged: dict[int, tuple[Session, int]] = {}
        self._tags: dict[str, range] = {}
        self._next_tag = 1
        self._commands: deque[decode_pb2.AttachRequest] = deque()
        self._wake_writer = asyncio.Event()
        stub = decode_pb2_grpc.DecodeServiceStub(worker.channel)  # type: ignore[no-untyped-call]
        self._call = stub.Attach()
        self._tasks = [
            asyncio.create_task(self._write(), name=f"attach-write-{worker.address}"),
            asyncio.create_task(self._read(), name=f"attach-read-{worker.address}"),
        ]

    @property
    def num_sessions(self) -> int:
        """Requests that are on the stream."""
        return len(self._sessions)

    @property
    def num_tags(self) -> int:
        """Choices that the worker may tell of in short."""
        return len(self._tagged) + len(self._tags)

    def submit(self, submit: decode_pb2.Submit, session: Session) -> None:
        """Hand a request over. Its news come to `session` from now on. Raises WorkerLost."""
        if self.broken:
            raise WorkerLost(f"decode worker {self.worker.address} is not connected")
        name = submit.request_id
        tags = range(self._next_tag, self._next_tag + submit.sampling.n)
        self._next_tag = tags.stop
        submit.first_tag = tags.start
        self._sessions[name] = session
        self._tags[name] = tags
        self._tagged.update((tag, (session, i)) for i, tag in enumerate(tags))
        self._send(decode_pb2.AttachRequest(submit=submit))

    def start(
        self,
        request_id: str,
        first_token_ids: list[int],
        kv_receipt: common_pb2.KvReceipt | None = None,
    ) -> None:
        """Give a request its first tokens, and the prefill worker's receipt if there is one."""
        start = decode_pb2.Start(
            request_id=request_id, first_token_ids=first_token_ids, kv_receipt=kv_receipt
        )
        self._send(decode_pb2.AttachRequest(start=start))

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """End one choice of a request there."""
        if request_id in self._sessions:
            cancel = decode_pb2.Cancel(request_id=request_id, choice=choice)
            self._send(decode_pb2.AttachRequest(cancel=cancel))

    def leave(self, request_id: str, *, finished: bool) -> None:
        """Forget a request; one that has not finished there is cancelled there. Idempotent."""
        for tag in self._tags.pop(request_id, ()):
            self._tagged.pop(tag, None)
        if self._sessions.pop(request_id, None) is not None and not finished:
            cancel = decode_pb2.Cancel(request_id=request_id)
            self._send(decode_pb2.AttachRequest(cancel=cancel))

    async def close(self) -> None:
        """End the stream; sessions still on it are told."""
        self._break("the router is stopping")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self, command: decode_pb2.AttachRequest) -> None:
        if not self.broken:
            self._commands.append(command)
            self._wake_writer.set()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while self._commands:
                    await self._call.write(self._commands.popleft())
                self._wake_writer.clear()
                await self._wake_writer.wait()
        # The reader learns why the stream broke.

    async def _read(self) -> None:
        reason = "the worker ended the stream"
        try:
            async for response in self._call:
                self._dispatch(response)
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
        except Exception:
            _log.exception("reading from decode worker %s failed", self.worker.address)
            reason = "the router failed to read from it"
        finally:
            self._break(reason)

    def _dispatch(self, response: decode_pb2.AttachResponse) -> None:
        news, sessions = response.tokens, self._sessions
        # All of them before the first is told: lists that do not match say nothing.
        tokens = list(zip(news.tags, news.token_indexes, news.token_ids, strict=True))
        for delta in response.deltas:
            session = sessions.get(delta.request_id)
            if session is not None:
                session.on_delta(delta)
        for tag, index, token in tokens:
            of_choice = self._tagged.get(tag)
            if of_choice is not None:
                session, choice = of_choice
                session.on_token(choice, index, token)

    def _break(self, reason: str) -> None:
        if self.broken:
            return
        self.broken = True
        self._call.cancel()
        self._tasks[0].cancel()
        self._commands.clear()
        sessions, self._sessions = self._sessions, {}
        self._tagged.clear()
        self._tags.clear()
        if sessions:
            _log.warning(
                "decode worker %s is lost with %d requests: %s",
                *(self.worker.address, len(sessions), reason),
            )
        error = WorkerLost(f"the decode worker was lost ({reason})")
        for session in sessions.values():
            session.on_lost(error)


class DecodeLinks:
    """The streams that are open, one a worker, each opened when first needed."""

    def __init__(self) -> None:
        self._links: dict[str, DecodeLink] = {}

    def to(self, worker: Worker) -> DecodeLink:
        """The worker's stream; a new one if there is none or it has broken."""
        link = self._links.get(worker.address)
        if link is None or link.broken or link.worker is not worker:
            # An empty context: the stream outlives the request that happens to open it, and
            # must carry neither its trace nor its name in the log.
            link = contextvars.Context().run(DecodeLink, worker)
            self._links[worker.address] = link
        return link

    @property
    def num_sessions(self) -> int:
        """Requests on all streams."""
        return sum(link.num_sessions for link in self._links.values())

    @property
    def num_tags(self) -> int:
        """Choices that workers may tell of in short."""
        return sum(link.num_tags for link in self._links.values())

    @property
    def num_links(self) -> int:
        """Streams that are kept, broken ones that nobody has asked for again included."""
        return len(self._links)

    async def prune(self, workers: Collection[Worker]) -> None:
        """Forget streams to workers that are not among `workers`; one with requests stays."""
        gone = [
            link
            for link in self._links.values()
            if link.worker not in workers and not link.num_sessions
        ]
        for link in gone:
            del self._links[link.worker.address]
        for link in gone:
            await link.close()

    async def close(self) -> None:
        """End all streams."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.close()
