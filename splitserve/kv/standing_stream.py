"""A stream from a store that is opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable
from typing import Generic, Protocol, TypeVar

import grpc

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 0.5

_log = logging.getLogger(__name__)


class StreamCall(AsyncIterable[_T_co], Protocol[_T_co]):
    """A server stream of grpc.aio."""

    def cancel(self) -> bool:
        """End it."""


class StandingStream(Generic[_T]):
    """Calls `received` with each message and `broken` whenever the stream has ended, on the loop's
    thread, from `start` to `close`. What they raise is logged; a message that cannot be received
    ends the stream, and it is opened again.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[], StreamCall[_T]],
        received: Callable[[_T], None],
        broken: Callable[[], None],
    ) -> None:
        self._name = name
        self._call = call
        self._received = received
        self._broken = broken
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Ends the stream. If it was open, `broken` has been called once more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop, retry_s = asyncio.get_running_loop(), _FIRST_RETRY_S
        while True:
            began = loop.time()
            try:
                await self._listen()
            except grpc.aio.AioRpcError as error:
                _log.info("%s broke off: %s", self._name, error.details())
            except Exception:
                _log.exception("%s broke off", self._name)
            finally:
                self._tell_broken()
            if loop.time() - began > _LAST_RETRY_S:
                retry_s = _FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _listen(self) -> None:
        """One stream to its end."""
        call = self._call()
        try:
            async for message in call:
                self._received(message)
        finally:
            call.cancel()

    def _tell_broken(self) -> None:
        try:
            self._broken()
        except Exception:
            _log.exception("%s broke off, and so did what should be done then", self._name)
