"""DecodeService: one stream a router. Commands in, each step's news out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from services.decode.outbox import Outbox
from services.decode.session import Bench, Session
from splitserve.errors import Overloaded, Unavailable
from splitserve.v1 import decode_pb2, decode_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Keeps a session for each stream that is open."""

    def __init__(self, bench: Bench, *, max_pending_tokens: int) -> None:
        self._bench = bench
        self._max_pending_tokens = max_pending_tokens
        self._sessions: set[Session] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Attach(
        self, requests: AsyncIterator[decode_pb2.AttachRequest], context: Context
    ) -> None:
        """See decode.proto."""
        if self._draining:
            raise Unavailable("the decode worker is stopping; try another")
        # Ahead of the first message: while one waits that has the metadata with it, as for a router
        # that does not read, gRPC can send no status either.
        await context.send_initial_metadata(())
        outbox = Outbox(self._max_pending_tokens)
        session = Session(self._bench, outbox)
        self._sessions.add(session)
        self._idle.clear()
        try:
            await self._serve(session, outbox, requests, context)
        finally:
            session.close()
            self._sessions.discard(session)
            if not self._sessions:
                self._idle.set()
        if self._draining:
            raise Unavailable("the decode worker is stopping; attach to another")

    async def drain(self) -> None:
        """Take no new requests; return once those on every stream have ended."""
        self._draining = True
        for session in self._sessions:
            session.finish()
        await self._idle.wait()

    async def _serve(
        self,
        session: Session,
        outbox: Outbox,
        requests: AsyncIterator[decode_pb2.AttachRequest],
        context: Context,
    ) -> None:
        """Read and write until the last news is out. Raises `Overloaded` for a slow router."""
        reader = asyncio.create_task(_read(session, requests))
        writer = asyncio.create_task(_write(outbox, context))
        fell_behind = asyncio.create_task(session.fell_behind.wait())
        tasks = {reader, writer, fell_behind}
        try:
            while not (writer.done() or fell_behind.done()):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    reader.result()
                    tasks.discard(reader)
            if writer.done():
                writer.result()
            else:
                raise Overloaded(
                    f"the router left more than {self._max_pending_tokens} tokens unread; "
                    "attach again and read faster"
                )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _read(session: Session, requests: AsyncIterator[decode_pb2.AttachRequest]) -> None:
    """Carry out commands. A router that sends no more gets what it asked for, then the end."""
    with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.InternalError):
        async for command in requests:
            session.handle(command)
    session.finish()


async def _write(outbox: Outbox, context: Context) -> None:
    while (message := await outbox.take()) is not None:
        await context.write(message)
