"""The directory shared by the stores of several nodes, in Redis.

    splitserve:holders        set of holder ids
    splitserve:holder:{id}    hash, one field for each block the holder has

Each store is the source of truth for the holders that publish to it and for itself. It keeps them
in memory and mirrors them in the background. Both keys expire by themselves; a store refreshes
them for as long as it lives, so what a dead store mirrored vanishes within TTL_S, and the set of
holders with the last store. Nothing here waits for Redis
but a lookup, and that for at most LOOKUP_S: without Redis the answers are those of this store
alone, and after it came back everything is written again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from services.kvstore.directory import Holder, MemoryDirectory

TTL_S = 3
HEARTBEAT_S = 1.0
LOOKUP_S = 0.1

_HOLDERS = "splitserve:holders"
_HOLDER = "splitserve:holder:"
_GATHER_S = 0.01
_SOCKET_TIMEOUT_S = 2.0
_FIELDS_PER_COMMAND = 1000

_log = logging.getLogger(__name__)


class RedisDirectory:
    """See Directory, and BlockWatcher for the blocks of the store itself."""

    def __init__(self, url: str, memory: MemoryDirectory, *, own_id: Callable[[], str]) -> None:
        """`own_id` is the store's advertised address, once it is bound."""
        self._redis: Any = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
        )
        self._memory = memory
        self._own_id = own_id
        self._own_keys: set[bytes] = set()
        # What Redis has not been told yet: changed keys, and holders to write from scratch.
        self._changes: dict[str, dict[bytes, bool]] = {}
        self._rewrite: set[str] = set()
        self._closed: set[str] = set()
        self._reachable: bool | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_entries(self) -> int:
        """See Directory."""
        return self._memory.num_entries

    async def start(self) -> None:
        """See Directory."""
        self._task = asyncio.get_running_loop().create_task(self._mirror(), name="redis-mirror")

    async def stop(self) -> None:
        """See Directory."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with asyncio.timeout(_SOCKET_TIMEOUT_S):
                for holder_id in self._local():
                    await self._forget(holder_id)
        except (RedisError, OSError, TimeoutError):
            pass  # what is mirrored expires
        await self._redis.aclose()

    def open(self, holder_id: str) -> Holder:
        """See Directory."""
        token = self._memory.open(holder_id)
        self._start_over(holder_id)
        return token

    def update(self, token: object, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """See Directory."""
        added, removed = list(added), list(removed)
        self._memory.update(token, added, removed)
        if isinstance(token, Holder) and self._memory.is_open(token):
            self._note(token.holder_id, removed, False)
            # Only what memory had room for: what it does not know it could never take back.
            self._note(token.holder_id, [key for key in added if key in token.keys], True)

    def close(self, token: object) -> None:
        """See Directory."""
        if isinstance(token, Holder) and self._memory.is_open(token):
            self._memory.close(token)
            self._changes.pop(token.holder_id, None)
            self._rewrite.discard(token.holder_id)
            self._closed.add(token.holder_id)
            self._wake.set()

    def added(self, key: bytes) -> None:
        """See BlockWatcher."""
        self._own_keys.add(key)
        self._note(self._own_id(), [key], True)

    def removed(self, key: bytes) -> None:
        """See BlockWatcher."""
        self._own_keys.discard(key)
        self._note(self._own_id(), [key], False)

    async def lookup(self, keys: Sequence[bytes]) -> dict[str, int]:
        """See Directory."""
        lengths = await self._memory.lookup(keys)
        if not self._reachable or not keys:
            return lengths
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._lookup_elsewhere(keys) | lengths
        except TimeoutError:
            return lengths  # slow, perhaps gone: that is for the mirror to find out
        except (RedisError, OSError) as err:
            self._lost(err)
            return lengths

    async def _lookup_elsewhere(self, keys: Sequence[bytes]) -> dict[str, int]:
        holder_ids = sorted(await self._elsewhere())
        async with self._redis.pipeline(transaction=False) as pipe:
            for holder_id in holder_ids:
                pipe.hmget(_HOLDER + holder_id, keys)
            rows: list[list[bytes | None]] = await pipe.execute()
        lengths = {
            holder_id: next((at for at, value in enumerate(row) if value is None), len(row))
            for holder_id, row in zip(holder_ids, rows, strict=True)
        }
        return {holder_id: length for holder_id, length in lengths.items() if length}

    async def _mirror(self) -> None:
        """Tells Redis what changed, at once, and that this store lives, every HEARTBEAT_S."""
        beat_at = 0.0
        while True:
            try:
                if not self._reachable:
                    await self._redis.ping()
                    self._found()
                await self._write_changes()
                if asyncio.get_running_loop().time() >= beat_at:
                    await self._heartbeat()
                    beat_at = asyncio.get_running_loop().time() + HEARTBEAT_S
            except (RedisError, OSError, TimeoutError) as err:
                self._lost(err)
                await asyncio.sleep(HEARTBEAT_S)
                continue
            await self._changed_or_beat(beat_at)

    async def _changed_or_beat(self, beat_at: float) -> None:
        try:
            async with asyncio.timeout_at(beat_at):
                await self._wake.wait()
                await asyncio.sleep(_GATHER_S)  # one round for changes that come together
        except TimeoutError:
            pass
        self._wake.clear()

    async def _write_changes(self) -> None:
        closed, self._closed = self._closed, set()
        rewrite, self._rewrite = self._rewrite, set()
        changes, self._changes = self._changes, {}
        for holder_id in closed:
            await self._forget(holder_id)
        local = self._local()
        for holder_id in rewrite & local.keys():
            await self._redis.delete(_HOLDER + holder_id)
            await self._apply(holder_id, dict.fromkeys(local[holder_id], True))
        for holder_id in changes.keys() - rewrite:
            await self._apply(holder_id, changes[holder_id])

    async def _apply(self, holder_id: str, changes: dict[bytes, bool]) -> None:
        name, items = _HOLDER + holder_id, list(changes.items())
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.sadd(_HOLDERS, holder_id)
            for start in range(0, len(items), _FIELDS_PER_COMMAND):
                part = items[start : start + _FIELDS_PER_COMMAND]
                if present := {key: b"" for key, has in part if has}:
                    pipe.hset(name, mapping=present)
                if absent := [key for key, has in part if not has]:
                    pipe.hdel(name, *absent)
            pipe.expire(name, TTL_S)
            pipe.expire(_HOLDERS, TTL_S)
            await pipe.execute()

    async def _heartbeat(self) -> None:
        local = self._local()
        async with self._redis.pipeline(transaction=False) as pipe:
            for holder_id in local:
                pipe.expire(_HOLDER + holder_id, TTL_S)
            if present := [holder_id for holder_id, keys in local.items() if keys]:
                pipe.sadd(_HOLDERS, *present)
            pipe.expire(_HOLDERS, TTL_S)
            alive = await pipe.execute()
        for (holder_id, keys), is_alive in zip(local.items(), alive, strict=False):
            if keys and not is_alive:  # it ran out, or another store took it for dead
                self._start_over(holder_id)
        await self._trim(sorted(await self._elsewhere()))

    async def _trim(self, holder_ids: list[str]) -> None:
        """Takes holders that have nothing any more off the list; one that comes back is put on."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for holder_id in holder_ids:
                pipe.exists(_HOLDER + holder_id)
            present = await pipe.execute()
        gone = [one for one, exists in zip(holder_ids, present, strict=True) if not exists]
        if gone:
            await self._redis.srem(_HOLDERS, *gone)

    async def _forget(self, holder_id: str) -> None:
        await self._redis.delete(_HOLDER + holder_id)
        await self._redis.srem(_HOLDERS, holder_id)

    async def _elsewhere(self) -> set[str]:
        members: set[bytes] = await self._redis.smembers(_HOLDERS)
        return {member.decode() for member in members} - self._local().keys()

    def _local(self) -> dict[str, set[bytes]]:
        holders = {holder.holder_id: holder.keys for holder in self._memory.holders}
        return holders | {self._own_id(): self._own_keys}

    def _note(self, holder_id: str, keys: Iterable[bytes], has: bool) -> None:
        if self._reachable:  # otherwise everything is written again later
            self._changes.setdefault(holder_id, {}).update(dict.fromkeys(keys, has))
            self._wake.set()

    def _start_over(self, holder_id: str) -> None:
        self._changes.pop(holder_id, None)
        self._closed.discard(holder_id)
        self._rewrite.add(holder_id)
        self._wake.set()

    def _found(self) -> None:
        if self._reachable is False:
            _log.info("the directory in Redis is back")
        self._reachable = True
        self._rewrite = set(self._local())

    def _lost(self, err: Exception) -> None:
        if self._reachable is not False:
            _log.warning("the directory in Redis is out of reach, going on without: %s", err)
        self._reachable = False
        self._changes.clear()
