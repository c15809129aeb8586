"""A reader that cannot map the pools of blocks asks for these anew, and only then waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from splitserve.kv.block_client import BlockClient
from splitserve.kv.layout import KvLayout, Lease
from splitserve.v1 import kvstore_pb2

LEASE = Lease("lease", 1, "store:1")
KEYS = [bytes([k]) * 32 for k in range(3)]


class Answer:
    """One stream of one message."""

    def __init__(self, message: kvstore_pb2.AwaitBlocksResponse) -> None:
        self._message = message

    async def __aiter__(self) -> AsyncIterator[kvstore_pb2.AwaitBlocksResponse]:
        yield self._message

    def cancel(self) -> bool:
        return True


class Control:
    """A store that keeps each block in the pool of its number, unless that is unmapped."""

    def __init__(self) -> None:
        self.stub = self
        self.unmapped: list[set[int]] = []

    def PublishBlocks(self) -> None:
        raise AssertionError("nothing is published")

    def AwaitBlocks(self, request: kvstore_pb2.AwaitBlocksRequest, timeout: float) -> Answer:
        self.unmapped.append(set(request.unmapped_pool_ids))
        ready = []
        for key in request.keys:
            block = kvstore_pb2.ReadableBlock(key=key, size_bytes=8, num_tokens=4)
            if key[0] and key[0] not in request.unmapped_pool_ids:
                block.pool_page.pool_id = key[0]
            ready.append(block)
        return Answer(kvstore_pb2.AwaitBlocksResponse(ready=ready))


class Runs:
    async def of(self, lease: Lease) -> None:
        assert lease == LEASE

    def lost(self) -> None:
        """Nothing is."""


class Peers:
    """Answers once all `expected` pools were asked for together."""

    domain = "test"

    def __init__(self, within: set[int], expected: int) -> None:
        self.within = within
        self.unmapped: list[int] = []
        self._asked = asyncio.Barrier(expected)

    async def reaches(self, pool_id: int) -> bool:
        await self._asked.wait()
        return pool_id in self.within


async def ask(control: Control, peers: Peers | None) -> list[tuple[bytes, int]]:
    client = BlockClient(
        control,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        Runs(),  # type: ignore[arg-type]
        worker_id="test",
        layout=KvLayout(b"f" * 32, 4, 8),
        rpc_timeout_s=1.0,
        metrics=None,
    )
    client._peers = peers  # type: ignore[assignment]
    got = []
    async with asyncio.timeout(5):
        async for ready, missing in client.await_blocks(LEASE, KEYS, True):
            assert missing == []
            got += [(b.key, b.pool_page.pool_id if b.pool_page else 0) for b in ready]
    return got


async def test_pools_are_asked_for_together_and_those_out_of_reach_for_this_call_only() -> None:
    control = Control()
    got = await ask(control, Peers({1}, expected=2))
    assert got == [(KEYS[0], 0), (KEYS[1], 1), (KEYS[2], 0)]
    assert control.unmapped == [set(), {2}]
    got = await ask(control, Peers({1, 2}, expected=2))
    assert got == [(KEYS[0], 0), (KEYS[1], 1), (KEYS[2], 2)]
    assert control.unmapped[2:] == [set()]


async def test_what_could_not_be_opened_is_told_at_once() -> None:
    control, peers = Control(), Peers({1}, expected=1)
    peers.unmapped = [2]
    assert await ask(control, peers) == [(KEYS[0], 0), (KEYS[1], 1), (KEYS[2], 0)]
    assert control.unmapped == [{2}]


async def test_without_pools_of_others_nothing_is_within_reach() -> None:
    control = Control()
    assert await ask(control, None) == [(key, 0) for key in KEYS]
    assert control.unmapped == [set(), {1, 2}]
