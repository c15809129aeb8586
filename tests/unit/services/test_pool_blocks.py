"""Blocks that stay in the worker's pool until they were read."""

from __future__ import annotations

import asyncio

import pytest

from services.prefill.hand_over import ABANDON_WITHIN_S
from splitserve.engine.fake import FakeEngine
from splitserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    SplitserveError,
    Unavailable,
)

from .hand_over_rig import KEYS, PAGES, PRESENT, Rig, digest_of, sealed


@pytest.fixture
async def rig() -> Rig:
    return Rig()


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


async def test_layers_are_told_of_once_when_the_last_group_is_all_that_is_missing() -> None:
    rig = Rig(spec=FakeEngine(num_pages=8, block_tokens=4, layer_group=1).spec)
    rig.store.shares = True
    rig.hand_over.begin(KEYS, PAGES, 0)
    for end in range(1, 4):
        rig.hand_over.layers_done(0, 3, end - 1, end)
        await rig.until(lambda: [b.written for b in rig.hand_over._blocks] == [end] * 3)  # noqa: B023
    await rig.until(lambda: len(rig.store.reported) == 3)
    assert {num_layers for _, _, num_layers in rig.store.reported} == {3}
    ended = asyncio.ensure_future(rig.hand_over.ended())
    rig.hand_over.complete()
    await rig.until(lambda: len(rig.store.shared) == 3)
    rig.listener.gone(KEYS)
    await asyncio.wait_for(ended, 5)
    assert len(rig.store.reported) == 3


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
