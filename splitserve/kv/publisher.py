"""Keeps a store's directory up to date with what a worker's pool has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import grpc

from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

_log = logging.getLogger(__name__)

_KEYS_PER_MESSAGE = 4096
_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 0.5


class PoolPublisher:
    """One PublishBlocks stream for as long as the worker lives.

    Changes made while a message is under way are merged into the next. After a broken stream the
    store has forgotten the holder, so the next one begins with all that the pool has.
    """

    def __init__(
        self,
        stub: kvstore_pb2_grpc.KvStoreServiceStub,
        holder_id: str,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_broken` is told whenever the store turns out to be out of reach.

        The stream is open, and so is watched, always. One that the store refuses to go on with
        tells nothing of its reach.
        """
        self._stub = stub
        self._holder_id = holder_id
        self._on_broken = on_broken
        self._have: set[bytes] = set()
        self._changes: dict[bytes, bool] = {}  # key -> whether the pool has it now
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.reachable = True

    def start(self) -> None:
        """Begins to publish, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="kv-publisher")

    async def close(self) -> None:
        """Ends the stream; the store forgets the holder."""
        # grpc.aio turns a cancellation during a write into InvalidStateError, hence the flag.
        self._closing.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def publish(self, added: Iterable[bytes] = (), removed: Iterable[bytes] = ()) -> None:
        """Notes what the pool gained and lost. Returns at once; call on the loop's thread."""
        for key in added:
            self._have.add(key)
            self._changes[key] = True
        for key in removed:
            self._have.discard(key)
            self._changes[key] = False
        self._wake.set()

    async def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._closing.is_set():
            began = asyncio.get_running_loop().time()
            try:
                await self._stream()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as err:
                if self._closing.is_set():
                    return
                _log.warning("publishing to the directory broke off: %s", _reason(err))
                if _is_unreachable(err):
                    self.reachable = False
                    self._on_broken()
            if asyncio.get_running_loop().time() - began > _LAST_RETRY_S:
                retry_s = _FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _stream(self) -> None:
        """Publishes all the pool has, then its changes, until the store ends the stream."""
        call = self._stub.PublishBlocks()
        call.add_done_callback(lambda _: self._wake.set())
        try:
            await call.write(kvstore_pb2.PublishBlocksRequest(holder_id=self._holder_id))
            await call.initial_metadata()
            if not call.done():
                self.reachable = True
            self._changes = dict.fromkeys(self._have, True)
            while not call.done():
                for message in self._take_changes():
                    await call.write(message)
                await self._wake.wait()
                self._wake.clear()
            await call  # raises what ended it
        except asyncio.InvalidStateError:  # what a write to a stream that has ended raises
            if not call.done():
                raise
            await call
        finally:
            call.cancel()

    def _take_changes(self) -> list[kvstore_pb2.PublishBlocksRequest]:
        changes, self._changes = list(self._changes.items()), {}
        return [
            kvstore_pb2.PublishBlocksRequest(
                added_keys=[key for key, has in part if has],
                removed_keys=[key for key, has in part if not has],
            )
            for start in range(0, len(changes), _KEYS_PER_MESSAGE)
            for part in [changes[start : start + _KEYS_PER_MESSAGE]]
        ]


def _is_unreachable(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


def _reason(error: Exception) -> str:
    return (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)
