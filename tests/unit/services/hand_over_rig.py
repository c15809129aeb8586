"""A hand-over over a store that keeps what it is told, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from services.prefill.hand_over import HandOver
from splitserve.engine.fake import FakeEngine
from splitserve.engine.protocol import EngineSpec
from splitserve.errors import (
    Overloaded,
    SplitserveError,
)
from splitserve.kv.codec import block_digest
from splitserve.kv.layout import BlockSpec, KvLayout, Lease, Reservation, ReservationState
from splitserve.kv.page_part import PagePart
from splitserve.kv.pool_sharing import PoolShare, ShareListener

SPEC = FakeEngine(num_pages=8, block_tokens=4).spec
LAYOUT = KvLayout(SPEC.fingerprint, SPEC.block_tokens, SPEC.block_bytes)
LEASE = Lease("lease", 1, "store:1")
KEYS = [bytes([k]) * 32 for k in range(3)]
PAGES = [5, 2, 7]
WRITE, PRESENT = ReservationState.WRITE, ReservationState.PRESENT


class StubStore:
    """Keeps what is written. `gate` holds back the answer to `reserve`. With `shares` blocks may
    stay in the pool, but those that are `out_of_reach`.
    """

    layout = LAYOUT
    transport_name = "stub"

    def __init__(self) -> None:
        self.states = dict.fromkeys(KEYS, WRITE)
        self.specs: list[BlockSpec] = []
        self.content = {key: bytearray(SPEC.block_bytes) for key in KEYS}
        self.parts: list[tuple[bytes, int, int]] = []
        self.exports: list[tuple[int, int, int]] = []
        self.shares = False
        self.seals_pages = False
        self.out_of_reach: set[bytes] = set()
        self.listener: ShareListener | None = None
        self.reported: list[tuple[bytes, int, int]] = []
        self.shared: dict[bytes, tuple[int, int]] = {}
        self.committed: dict[bytes, bytes] = {}
        self.abandoned: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: dict[str, SplitserveError] = {}
        self.no_room: set[bytes] = set()
        self.report_gate = asyncio.Event()
        self.report_gate.set()
        self.sharing = asyncio.Event()
        self.sharing_gate = asyncio.Event()
        self.sharing_gate.set()
        self.sealing_gate = asyncio.Event()
        self.sealing_gate.set()
        self.abandon_gate = asyncio.Event()
        self.abandon_gate.set()
        self.num_checks = 0
        self.checks_gate = asyncio.Event()
        self.checks_gate.set()

    def open_share(self, listener: ShareListener) -> PoolShare | None:
        self.listener = listener
        return PoolShare(1, 7) if self.shares else None

    def close_share(self, share: PoolShare) -> None:
        self.listener = None

    async def reserve(
        self, lease: Lease, blocks: Sequence[BlockSpec], share: PoolShare | None = None
    ) -> list[Reservation]:
        await self.gate.wait()
        self._fail("reserve")
        if self.no_room.intersection(block.key for block in blocks) and share is None:
            raise Overloaded("full")
        self.specs = list(blocks)
        answers = [Reservation(self.states[b.key], 0, b.size_bytes) for b in blocks]
        return [
            replace(answer, in_pool=share is not None and spec.key not in self.out_of_reach)
            for answer, spec in zip(answers, blocks, strict=True)
        ]

    async def put_pages(self, lease: Lease, parts: Sequence[PagePart]) -> None:
        self._fail("write")
        layer = SPEC.layer_bytes
        for part in parts:
            assert part.reservation.must_write
            assert not part.reservation.in_pool
            first, end = part.first_layer * layer, part.end_layer * layer
            data = page_content(part.page)[first:end]
            if part.hasher:
                part.hasher.update(data)
            self.exports.append((part.page, part.first_layer, part.end_layer))
            self.parts.append((part.key, first, end - first))
            self.content[part.key][first:end] = data

    async def report_layers(
        self, lease: Lease, share: PoolShare, blocks: Sequence[tuple[bytes, int, int]]
    ) -> None:
        await self.report_gate.wait()
        self._fail("report")
        assert not self.shared.keys() & {key for key, _, _ in blocks}, (
            "committed blocks are told of"
        )
        self.reported += blocks

    async def seal_pages(
        self, blocks: Sequence[tuple[bytes, int, int]], *, staying: bool
    ) -> list[bytes]:
        stays = {key for key, _, _ in blocks} - {key for key, _, _ in self.parts}
        assert staying == bool(stays)
        await self.sealing_gate.wait()
        self._fail("seal")
        return [sealed(key, num_tokens, page) for key, num_tokens, page in blocks]

    async def share_pages(
        self, lease: Lease, share: PoolShare, blocks: Sequence[tuple[bytes, int, bytes]]
    ) -> None:
        self.sharing.set()
        await self.sharing_gate.wait()
        self._fail("share")
        assert share == PoolShare(1, 7)
        for key, page, digest in blocks:
            num_tokens = next(spec.num_tokens for spec in self.specs if spec.key == key)
            assert digest == sealed(key, num_tokens, page)
            self.shared[key] = (num_tokens, page)

    async def commit(self, lease: Lease, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        self._fail("commit")
        self.committed.update(blocks)

    async def abandon(self, lease: Lease, keys: Iterable[bytes]) -> None:
        self.abandoned += keys
        await self.abandon_gate.wait()

    async def check_lease(self, lease: Lease) -> None:
        self.num_checks += 1
        await self.checks_gate.wait()
        self._fail("check")

    def _fail(self, method: str) -> None:
        if method in self.fault:
            raise self.fault[method]


class Rig:
    def __init__(self, ask_every_s: float = 60.0, spec: EngineSpec = SPEC) -> None:
        self.store = StubStore()
        self.hand_over = HandOver(
            LEASE,
            prompt_tokens=10,
            spec=spec,
            open_store=self.open_store,
            ask_every_s=ask_every_s,
        )

    @property
    def listener(self) -> ShareListener:
        assert self.store.listener is not None, "nothing is shared"
        return self.store.listener

    async def open_store(self, lease: Lease) -> StubStore:
        self.store._fail("open")
        return self.store

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def finish(self) -> None:
        await asyncio.sleep(0)  # what was posted from the engine's thread runs first
        self.hand_over.complete()
        await asyncio.wait_for(self.hand_over.ended(), 5)


def sealed(key: bytes, num_tokens: int, page: int) -> bytes:
    return key[:8] + num_tokens.to_bytes(4, "little") + page.to_bytes(4, "little")


def page_content(page: int) -> bytes:
    return bytes((page * 31 + i) % 251 for i in range(SPEC.block_bytes))


def digest_of(index: int) -> bytes:
    tokens = 2 if index == 2 else 4
    return block_digest(KEYS[index], tokens, LAYOUT.fingerprint, page_content(PAGES[index]))
