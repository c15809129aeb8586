"""Blocks on their way to the arena while later layers are computed."""

from __future__ import annotations

import asyncio

import pytest

from splitserve.errors import (
    LeaseEnded,
    Overloaded,
    Unavailable,
)
from splitserve.kv.layout import ReservationState

from .hand_over_rig import KEYS, PAGES, PRESENT, SPEC, Rig, digest_of, page_content, sealed


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


async def test_blocks_for_the_arena_are_sealed_where_pages_are_digested(rig: Rig) -> None:
    rig.store.seals_pages = True
    rig.hand_over.begin(KEYS, PAGES, 0)
    rig.hand_over.layers_done(0, 3, 0, 2)
    await rig.until(lambda: len(rig.store.parts) == 3)
    rig.store.sealing_gate.clear()
    rig.hand_over.complete()
    await rig.until(lambda: len(rig.store.parts) == 6)
    assert rig.store.committed == {}, "written, and not digested yet"
    rig.store.sealing_gate.set()
    await rig.finish()
    tokens = (4, 4, 2)
    assert rig.store.committed == {
        key: sealed(key, count, page) for key, count, page in zip(KEYS, tokens, PAGES, strict=True)
    }
    assert [bytes(rig.store.content[key]) for key in KEYS] == [page_content(p) for p in PAGES]


@pytest.mark.parametrize("step", ["seal", "write"])
async def test_what_cannot_be_sealed_or_written_is_given_up(rig: Rig, step: str) -> None:
    rig.store.seals_pages = True
    rig.store.fault = {step: Unavailable("the store is gone")}
    rig.hand_over.begin(KEYS, PAGES, 0)
    await rig.finish()
    assert rig.store.committed == {}
    assert sorted(rig.store.abandoned) == KEYS


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
