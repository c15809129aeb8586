from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest

from services.prefill.hand_over import ABANDON_WITHIN_S, HandOver
from splitserve.engine.fake import FakeEngine
from splitserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    SplitserveError,
    Unavailable,
)
from splitserve.kv.codec import block_digest
from splitserve.kv.layout import BlockSpec, KvLayout, Lease, Reservation, ReservationState
from splitserve.kv.page_mover import PagePart
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

    async def seal_pages(self, blocks: Sequence[tuple[bytes, int, int]]) -> list[bytes]:
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
    def __init__(self, ask_every_s: float = 60.0) -> None:
        self.store = StubStore()
        self.hand_over = HandOver(
            LEASE,
            prompt_tokens=10,
            spec=SPEC,
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


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_layers_are_written_while_later_ones_are_computed(rig: Rig) -> None:
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 2, 0, 2)
    half = 2 * SPEC.layer_bytes
    await rig.until(lambda: len(rig.store.parts) == 2)
    assert rig.store.parts == [(KEYS[0], 0, half), (KEYS[1], 0, half)]
    assert rig.store.committed == {}
    rig.hand_over.layers_done(0, 2, 2, 4)
    await rig.until(lambda: len(rig.store.committed) == 2)
    rig.hand_over.layers_done(2, 3, 0, 2)
    rig.hand_over.layers_done(2, 3, 2, 4)
    rig.hand_over.blocks_done(2, 3)
    await rig.finish()
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}
    assert [bytes(rig.store.content[key]) for key in KEYS] == [page_content(p) for p in PAGES]
    assert [spec.num_tokens for spec in rig.store.specs] == [4, 4, 2]
    assert rig.store.abandoned == []
    stats = rig.hand_over.stats
    assert (stats.num_blocks, stats.num_bytes) == (3, 3 * SPEC.block_bytes)


async def test_what_is_ready_before_the_reservation_is_kept(rig: Rig) -> None:
    rig.store.gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 1)
    for first in (0, 2):
        rig.hand_over.layers_done(1, 3, first, first + 2)
    await asyncio.sleep(0)
    rig.hand_over.complete()
    assert rig.store.exports == []
    rig.store.gate.set()
    await rig.finish()
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}
    assert rig.store.exports == [(page, 0, 4) for page in PAGES]


async def test_blocks_of_others_are_left_to_them(rig: Rig) -> None:
    rig.store.states[KEYS[0]] = PRESENT
    rig.store.states[KEYS[2]] = ReservationState.BEING_WRITTEN
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.blocks_done(0, 3)
    await rig.finish()
    assert rig.store.committed == {KEYS[1]: digest_of(1)}
    assert rig.store.abandoned == []
    assert rig.hand_over.stats.num_present == 2


async def test_cancel_abandons_what_is_not_committed(rig: Rig) -> None:
    rig.hand_over.begin(KEYS, PAGES, 1)
    await rig.until(lambda: KEYS[0] in rig.store.committed)
    rig.hand_over.layers_done(1, 2, 0, 2)
    await rig.until(lambda: len(rig.store.parts) == 2)
    rig.hand_over.cancel()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    rig.hand_over.blocks_done(1, 3)
    await asyncio.sleep(0)
    assert rig.store.committed == {KEYS[0]: digest_of(0)}
    assert rig.store.abandoned == [KEYS[1], KEYS[2]]


async def test_cancel_before_the_beginning(rig: Rig) -> None:
    rig.hand_over.cancel()
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.finish()
    assert rig.store.specs == []


@pytest.mark.parametrize("method", ["open", "reserve", "write", "commit"])
async def test_a_fault_of_the_store_ends_the_hand_over_only(rig: Rig, method: str) -> None:
    fault = Overloaded("full") if method == "reserve" else LeaseEnded("over")
    rig.store.fault[method] = fault
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.blocks_done(0, 3)
    await rig.finish()
    assert rig.store.committed == {}
    assert rig.hand_over.stats.error is fault
    reserved = method in ("write", "commit")
    assert rig.store.abandoned == (KEYS if reserved else [])


async def test_blocks_that_may_stay_are_shared_when_whole_and_kept_until_gone(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 2, 0, 2)
    await rig.until(lambda: len(rig.store.reported) == 2)
    assert rig.store.reported == [
        (key, page, 2) for key, page in zip(KEYS[:2], PAGES[:2], strict=True)
    ]
    assert rig.store.shared == {}
    rig.hand_over.layers_done(0, 1, 2, 4)
    await rig.until(lambda: rig.store.shared == {KEYS[0]: (4, PAGES[0])})
    rig.hand_over.complete()
    await rig.until(lambda: len(rig.store.shared) == 3)
    assert rig.store.shared[KEYS[2]] == (2, PAGES[2])
    assert (rig.hand_over.stats.num_blocks, rig.hand_over.stats.transport) == (3, "device")
    ended = asyncio.ensure_future(rig.hand_over.ended())
    rig.listener.gone([KEYS[0], KEYS[2]])
    await asyncio.sleep(0.01)
    assert not ended.done(), "a page is still read"
    rig.listener.gone([KEYS[1]])
    await asyncio.wait_for(ended, 5)
    assert rig.store.committed == {}
    assert rig.store.abandoned == []


async def test_the_receipt_names_what_stays_as_soon_as_the_last_is_digested(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.states[KEYS[1]] = PRESENT
    rig.store.sharing_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 3, 0, 2)
    await rig.until(lambda: len(rig.store.reported) == 2)
    assert await rig.hand_over.receipt(0.001) is None, "not all is computed"
    rig.hand_over.complete()
    receipt = await rig.hand_over.receipt(5)
    assert rig.store.shared == {}, "ahead of the commit"
    assert receipt is not None
    assert (receipt.pool_id, receipt.share_id) == (1, 7)
    assert receipt.blocks == {
        0: (PAGES[0], sealed(KEYS[0], 4, PAGES[0])),
        2: (PAGES[2], sealed(KEYS[2], 2, PAGES[2])),
    }
    rig.store.sharing_gate.set()
    await rig.until(lambda: len(rig.store.shared) == 2)
    rig.listener.gone(KEYS)
    await asyncio.wait_for(rig.hand_over.ended(), 5)


async def test_blocks_sealed_in_several_rounds_are_all_on_the_receipt(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.blocks_done(0, 1)
    await rig.until(lambda: len(rig.store.shared) == 1)
    rig.hand_over.blocks_done(1, 3)
    receipt = await rig.hand_over.receipt(5)
    assert receipt is not None
    assert {index: page for index, (page, _) in receipt.blocks.items()} == dict(enumerate(PAGES))
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.listener.gone(KEYS)
    await rig.finish()


async def test_no_receipt_where_nothing_stays(rig: Rig) -> None:
    assert await rig.hand_over.receipt(5) is None, "nothing has begun"
    rig.hand_over.begin(KEYS, PAGES, 0)
    await asyncio.sleep(0)
    assert await rig.hand_over.receipt(5) is None, "before anything is ready"
    await rig.finish()


async def test_a_receipt_is_not_waited_for_before_there_is_space(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: rig.store.listener is not None)
    assert await rig.hand_over.receipt(60) is None
    rig.store.gate.set()
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.listener.gone(KEYS)
    await rig.finish()


@pytest.mark.parametrize("fault", ["open", "reserve", "seal"])
async def test_no_receipt_after_a_fault(rig: Rig, fault: str) -> None:
    rig.store.shares = True
    rig.store.fault[fault] = LeaseEnded("over")
    rig.hand_over.begin(KEYS, PAGES, 3)
    await asyncio.sleep(0)
    assert await rig.hand_over.receipt(5) is None
    await rig.finish()


async def test_no_receipt_for_a_share_that_is_lost(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.sealing_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: rig.store.specs != [])
    rig.listener.lost()
    assert await rig.hand_over.receipt(60) is None
    rig.store.sealing_gate.set()
    await rig.finish()
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}


async def test_a_share_lost_after_the_receipt_was_given(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.sharing_gate.clear()
    rig.store.fault["share"] = InvalidRequest.single("pool_id", "not shared now")
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.store.sharing.wait()
    assert await rig.hand_over.receipt(5) is not None
    rig.listener.lost()
    rig.store.sharing_gate.set()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}


@pytest.mark.parametrize("receipt_was_given", [True, False])
async def test_a_lease_released_ahead_of_the_commit(rig: Rig, receipt_was_given: bool) -> None:
    rig.store.shares = True
    rig.store.fault["share"] = LeaseEnded("released")
    rig.hand_over.begin(KEYS, PAGES, 3 if receipt_was_given else 2)
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert (rig.hand_over.stats.error is None) == receipt_was_given
    assert (await rig.hand_over.receipt(5) is not None) == receipt_was_given


async def test_what_a_reader_cannot_map_is_written_after_all(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.out_of_reach = {KEYS[0]}
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: len(rig.store.shared) == 2)
    assert rig.store.committed == {KEYS[0]: digest_of(0)}
    rig.listener.wanted([KEYS[2]])
    await rig.until(lambda: KEYS[2] in rig.store.committed)
    assert rig.store.committed[KEYS[2]] == digest_of(2)
    assert KEYS[1] not in rig.store.committed
    rig.listener.lost()
    await asyncio.wait_for(rig.hand_over.ended(), 5)


async def test_cancel_gives_up_what_stays_in_the_pool(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 1)
    await rig.until(lambda: KEYS[0] in rig.store.shared)
    rig.hand_over.cancel()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.abandoned == KEYS
    assert rig.store.listener is None


async def test_a_store_that_hangs_is_not_waited_for_to_give_up(rig: Rig) -> None:
    rig.store.abandon_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 1)
    await rig.until(lambda: KEYS[0] in rig.store.committed)
    rig.hand_over.cancel()
    await asyncio.wait_for(rig.hand_over.ended(), 2 * ABANDON_WITHIN_S)
    assert rig.store.abandoned == KEYS[1:]


async def test_what_is_wanted_and_finds_no_room_is_abandoned_alone(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.store.no_room = {KEYS[2]}
    rig.listener.wanted([KEYS[2]])
    await rig.until(lambda: rig.store.abandoned == [KEYS[2]])
    assert isinstance(rig.hand_over.stats.error, Overloaded)
    rig.listener.wanted([KEYS[1]])
    await rig.until(lambda: KEYS[1] in rig.store.committed)
    rig.listener.gone([KEYS[0]])
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.abandoned == [KEYS[2]]
    assert list(rig.store.committed) == [KEYS[1]]


async def test_a_share_lost_before_a_commit_sends_what_is_not_whole_to_the_arena(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 1)
    rig.hand_over.layers_done(1, 2, 0, 2)
    await rig.until(lambda: KEYS[0] in rig.store.shared and len(rig.store.reported) == 1)
    rig.listener.lost()
    await rig.finish()
    assert list(rig.store.shared) == [KEYS[0]], "nothing is shared after it"
    assert rig.store.committed == {KEYS[1]: digest_of(1), KEYS[2]: digest_of(2)}
    assert rig.store.abandoned == []
    assert rig.hand_over.stats.error is None


async def test_a_report_is_not_waited_for(rig: Rig) -> None:
    """What becomes ready while it is under way is in the next one; digests are made meanwhile, and
    the commit is after it.
    """
    rig.store.shares = True
    rig.store.report_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 1, 0, 2)
    await rig.until(lambda: rig.hand_over._pool._telling is not None)
    rig.hand_over.layers_done(1, 3, 0, 2)
    rig.hand_over.blocks_done(0, 3)
    receipt = await rig.hand_over.receipt(5)
    assert receipt is not None
    assert len(receipt.blocks) == 3
    assert rig.store.shared == {}
    rig.store.report_gate.set()
    await rig.until(lambda: len(rig.store.shared) == 3)
    assert [key for key, _, _ in rig.store.reported] == [KEYS[0]]
    rig.listener.gone(KEYS)
    await rig.finish()


async def test_a_report_that_fails_ends_nothing(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.fault["report"] = Unavailable("not now")
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 3, 0, 2)
    await rig.until(lambda: rig.hand_over._pool._telling is not None)
    rig.hand_over.blocks_done(0, 3)
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.listener.gone(KEYS)
    await rig.finish()
    assert rig.hand_over.stats.error is None


async def test_cancel_ends_a_report_before_blocks_are_abandoned(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.report_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 3, 0, 2)
    await rig.until(lambda: rig.hand_over._pool._telling is not None)
    telling = rig.hand_over._pool._telling
    rig.hand_over.cancel()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert telling is not None
    assert telling.cancelled()
    assert sorted(rig.store.abandoned) == KEYS


async def test_a_share_lost_while_a_commit_waits_for_a_report_keeps_no_page(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.report_gate.clear()
    not_shared = InvalidRequest.single("pool_id", "not shared now")
    rig.store.fault.update(report=not_shared, share=not_shared)
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 3, 0, 2)
    await rig.until(lambda: rig.hand_over._pool._telling is not None)
    rig.hand_over.blocks_done(0, 3)
    assert await rig.hand_over.receipt(5) is not None
    rig.listener.lost()
    rig.store.report_gate.set()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}
    assert rig.hand_over._pool.kept == []
    assert rig.hand_over.stats.error is None


async def test_a_share_lost_before_the_reservation_is_answered(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: rig.store.listener is not None)
    rig.listener.lost()
    rig.store.gate.set()
    await rig.finish()
    assert rig.store.shared == {}
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}


async def test_without_room_what_a_lost_share_leaves_is_given_up(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.no_room = {KEYS[2]}
    rig.hand_over.begin(KEYS, PAGES, 2)
    await rig.until(lambda: len(rig.store.shared) == 2)
    rig.listener.lost()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.abandoned == [KEYS[2]]
    assert rig.store.committed == {}


async def test_a_share_lost_during_a_commit_that_succeeds_keeps_no_page(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.sharing_gate.clear()
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.store.sharing.wait()
    rig.listener.lost()
    rig.store.sharing_gate.set()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert len(rig.store.shared) == 3
    assert rig.store.committed == {}


async def test_a_share_lost_during_a_commit_that_fails_writes_to_the_arena(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.sharing_gate.clear()
    rig.store.fault["share"] = InvalidRequest.single("pool_id", "not shared now")
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.store.sharing.wait()
    rig.listener.wanted([KEYS[1]])
    rig.listener.lost()
    rig.store.sharing_gate.set()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.committed == {key: digest_of(i) for i, key in enumerate(KEYS)}
    assert rig.hand_over.stats.error is None


async def test_a_commit_that_the_store_refuses_ends_the_hand_over(rig: Rig) -> None:
    rig.store.shares = True
    rig.store.fault["share"] = InvalidRequest.single("pool_id", "not shared now")
    rig.hand_over.begin(KEYS, PAGES, 3)
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.hand_over.stats.error is rig.store.fault["share"]
    assert sorted(rig.store.abandoned) == KEYS


async def test_a_share_lost_after_a_commit_keeps_no_page(rig: Rig) -> None:
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.listener.lost()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert rig.store.abandoned == []


@pytest.mark.parametrize(
    ("fault", "is_fault"),
    [
        (LeaseEnded("over"), False),
        (Unavailable("gone"), True),
        (DeadlineExceeded("late"), True),
        (None, True),
    ],
)
async def test_pages_are_kept_no_longer_than_the_store_vouches_for_the_lease(
    fault: SplitserveError | None, is_fault: bool
) -> None:
    rig = Rig(ask_every_s=0.001)
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 3)
    await rig.until(lambda: rig.store.num_checks > 2)
    assert not rig.hand_over.stats.error
    if fault is None:  # the store hangs
        rig.store.checks_gate.clear()
    else:
        rig.store.fault["check"] = fault
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert isinstance(rig.hand_over.stats.error, Unavailable) is is_fault
    assert rig.store.abandoned == [], "a store that hangs is not waited for again"
    assert rig.store.listener is None


async def test_the_lease_is_not_asked_for_while_layers_are_computed() -> None:
    rig = Rig(ask_every_s=0.0)
    rig.store.shares = True
    rig.store.fault["check"] = LeaseEnded("over")
    rig.hand_over.begin(KEYS, PAGES, 2)
    await rig.until(lambda: len(rig.store.shared) == 2)
    for _ in range(10):
        await asyncio.sleep(0)
    assert rig.store.num_checks == 0
    rig.hand_over.complete()
    await asyncio.wait_for(rig.hand_over.ended(), 5)
    assert len(rig.store.shared) == 3
    assert rig.store.num_checks == 1
