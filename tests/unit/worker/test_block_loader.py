from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from splitserve.engine.sequence import PageLoad, Sequence
from splitserve.errors import BlockNotFound, LeaseEnded
from splitserve.kv.layout import Lease, PartialBlock, PoolPage, ReadableBlock
from splitserve.kv.receipt import KvReceipt
from splitserve.sampling import SamplingParams
from splitserve.worker.block_loader import BlockLoader

SIZE = 8
LEASE = Lease("lease", 1, "store:1")


class StubStore:
    """Decides blocks when told to; a block's content is its key, repeated."""

    transport_name = "stub"

    def __init__(self) -> None:
        self.asked: list[tuple[list[bytes], bool]] = []
        self.reads: list[bytes] = []
        self.corrupt: set[bytes] = set()
        self.decided: asyncio.Queue[tuple[list[bytes], list[bytes]] | Exception] = asyncio.Queue()
        self.open_streams = 0
        self.pages: dict[int, bytes] = {}
        self.in_pool = False
        self.partial: list[PartialBlock] = []
        self.ahead: list[tuple[list[bytes], list[list[int]], list[int]]] = []
        self.not_mapped: set[bytes] = set()
        self.firsts: list[int] = []
        self.size_bytes = SIZE
        self.let_go_of: list[set[bytes]] = []
        self.mapped = {1}
        self.taken: list[ReadableBlock] = []
        self.gone_pools: set[int] = set()
        self.places: dict[bytes, PoolPage] = {}

    async def await_blocks(
        self,
        lease: Lease,
        keys: list[bytes],
        wait_for_writer: bool,
        *,
        timeout_s: float,
        partial: list[PartialBlock],
    ) -> AsyncIterator[tuple[list[ReadableBlock], list[bytes]]]:
        assert lease == LEASE
        self.asked.append((list(keys), wait_for_writer))
        undecided, self.open_streams = set(keys), self.open_streams + 1
        try:
            while undecided:
                news = await self.decided.get()
                if isinstance(news, Exception):
                    raise news
                partial += self.partial
                self.partial = []
                undecided -= {*news[0], *news[1]}
                place = PoolPage(1, 2, 3) if self.in_pool else None
                yield (
                    [
                        ReadableBlock(k, 0, self.size_bytes, b"", 4, self.places.get(k, place))
                        for k in news[0]
                    ],
                    news[1],
                )
        finally:
            self.open_streams -= 1

    async def take_pages(
        self,
        lease: Lease,
        blocks: list[ReadableBlock],
        targets: list[list[int]],
        first_layers: list[int],
        *,
        hinted: set[bytes],
    ) -> list[bool]:
        self.hinted = set(hinted)
        if any(block.pool_page and block.pool_page.pool_id in self.gone_pools for block in blocks):
            raise BlockNotFound("the pool is gone")
        self.firsts += first_layers
        self.taken += blocks
        for block, pages in zip(blocks, targets, strict=True):
            self.reads.append(block.key)
            if block.key not in self.corrupt:
                self.pages.update(dict.fromkeys(pages, block.key * SIZE))
        return [block.key not in self.corrupt for block in blocks]

    def can_map(self, pool_id: int) -> bool:
        return pool_id in self.mapped

    async def copy_ahead(
        self, blocks: list[PartialBlock], targets: list[list[int]], first_layers: list[int]
    ) -> list[bool]:
        self.ahead.append(([block.key for block in blocks], targets, first_layers))
        return [block.key not in self.not_mapped for block in blocks]

    async def let_go(self, lease: Lease, keys: set[bytes]) -> None:
        self.let_go_of.append(keys)


class Rig:
    def __init__(self, *, num_loads: int = 1) -> None:
        self.store = StubStore()
        self.pages = self.store.pages
        self.answers: dict[str, int] = {}
        self.answered = asyncio.Condition()
        self.loader = BlockLoader(
            LEASE,
            open_store=self.open_store,
            loaded=self.loaded,
            block_bytes=SIZE,
            wait_for_writer=True,
            timeout_s=5.0,
            num_loads=num_loads,
        )

    async def open_store(self, lease: Lease) -> StubStore:
        return self.store

    def loaded(self, sequence_id: str, num_blocks: int) -> None:
        assert sequence_id not in self.answers, "the core is told once"
        self.answers[sequence_id] = num_blocks

    def load(self, sequence_id: str, keys: bytes, first_page: int) -> None:
        sequence = Sequence(sequence_id, [1], SamplingParams(), 0)
        blocks = [PageLoad(k - 97, bytes([k]), first_page + i, 4) for i, k in enumerate(keys)]
        self.loader.load(sequence, blocks)

    async def answer(self, sequence_id: str) -> int:
        async with asyncio.timeout(5):
            while sequence_id not in self.answers:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return self.answers[sequence_id]

    async def asked(self, count: int) -> None:
        await self.until(lambda: len(self.store.asked) >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def rig():
    made = Rig()
    yield made
    assert made.store.open_streams == 0


async def test_blocks_go_to_their_pages_as_they_come(rig: Rig) -> None:
    rig.load("s", b"abc", 10)
    rig.store.decided.put_nowait(([b"b"], []))  # early: it waits for the one before it
    rig.store.decided.put_nowait(([b"a"], []))
    rig.store.decided.put_nowait(([b"c"], []))
    assert await rig.answer("s") == 3
    assert rig.pages == {10: b"a" * SIZE, 11: b"b" * SIZE, 12: b"c" * SIZE}
    assert rig.store.reads == [b"a", b"b", b"c"]
    assert (rig.loader.stats.num_blocks, rig.loader.stats.num_bytes) == (3, 3 * SIZE)


async def test_choices_share_each_read(rig: Rig) -> None:
    rig.load("s0", b"abc", 10)
    rig.load("s1", b"bc", 20)  # it has the first block already
    await rig.asked(1)
    rig.store.decided.put_nowait(([b"a", b"b", b"c"], []))
    assert await rig.answer("s0") == 3
    assert await rig.answer("s1") == 2
    assert rig.store.reads == [b"a", b"b", b"c"]
    assert rig.pages[20] == b"b" * SIZE
    assert rig.pages[12] == rig.pages[21] == b"c" * SIZE


async def test_a_choice_that_comes_late_reads_again(rig: Rig) -> None:
    rig.load("s0", b"ab", 10)
    rig.store.decided.put_nowait(([b"a"], []))
    async with asyncio.timeout(5):
        while 10 not in rig.pages:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    rig.load("s1", b"ab", 20)
    await rig.asked(2)
    rig.store.decided.put_nowait(([b"b"], []))
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s0") == 2
    assert await rig.answer("s1") == 2
    assert rig.pages[20] == b"a" * SIZE


@pytest.mark.parametrize("fault", ["missing", "corrupt", "lease", "size"])
async def test_a_gap_ends_the_load(rig: Rig, fault: str) -> None:
    if fault == "corrupt":
        rig.store.corrupt.add(b"b")
    if fault == "size":
        rig.store.size_bytes = 4
    rig.load("s", b"abc", 10)
    if fault == "missing":
        rig.loader.prefill_done()
        rig.store.decided.put_nowait(([b"a", b"c"], [b"b"]))
    elif fault == "lease":
        rig.store.decided.put_nowait(([b"a"], []))
        rig.store.decided.put_nowait(LeaseEnded("over"))
    else:
        rig.store.decided.put_nowait(([b"a", b"b", b"c"], []))
    assert await rig.answer("s") == (0 if fault == "size" else 1)
    assert rig.loader.stats.num_corrupt == (fault in ("corrupt", "size"))
    assert 11 not in rig.pages


async def test_after_the_prefill_only_what_is_reserved_is_awaited(rig: Rig) -> None:
    rig.load("s", b"ab", 10)
    rig.store.decided.put_nowait(([b"a"], []))
    await rig.asked(1)
    rig.loader.prefill_done()
    await rig.asked(2)
    assert rig.store.asked == [([b"a", b"b"], True), ([b"b"], False)]
    rig.store.decided.put_nowait(([], [b"b"]))
    assert await rig.answer("s") == 1


async def test_a_load_that_begins_after_the_prefill_still_waits_a_little(rig: Rig) -> None:
    rig.loader.prefill_done()
    rig.load("s", b"a", 10)
    await rig.asked(1)
    assert rig.store.asked == [([b"a"], True)]
    rig.store.decided.put_nowait(([b"a"], []))
    assert await rig.answer("s") == 1


async def test_what_one_prefill_gave_up_another_may_write(rig: Rig) -> None:
    rig.load("s", b"ab", 10)
    rig.store.decided.put_nowait(([b"a"], [b"b"]))
    await rig.asked(2)
    assert rig.store.asked[1] == ([b"b"], True)
    rig.store.decided.put_nowait(([b"b"], []))
    assert await rig.answer("s") == 2


async def test_cancelled_loads_are_answered_at_once(rig: Rig) -> None:
    rig.load("s0", b"ab", 10)
    rig.load("s1", b"ab", 20)
    await rig.asked(1)
    rig.loader.cancel("s0")
    assert rig.answers == {"s0": 0}
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s1") == 2
    assert rig.pages.keys() == {20, 21}
    rig.loader.cancel("early")
    rig.load("early", b"ab", 30)
    assert await rig.answer("early") == 0
    rig.load("last", b"ab", 40)
    await rig.asked(2)
    rig.loader.cancel("last")
    assert rig.answers["last"] == 0
    await rig.loader.ended()
    assert 40 not in rig.pages


async def test_what_was_read_in_a_pool_is_let_go_when_every_choice_has_it() -> None:
    rig = Rig(num_loads=2)
    rig.store.in_pool = True
    rig.load("s0", b"ab", 10)
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s0") == 2
    await rig.loader.ended()
    assert rig.store.let_go_of == []
    rig.load("s1", b"ab", 20)
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s1") == 2
    await rig.loader.ended()
    assert rig.store.let_go_of == [{b"a", b"b"}]
    assert rig.loader.stats.transport == "device"


async def test_what_was_read_in_the_arena_is_held_until_the_lease_ends(rig: Rig) -> None:
    rig.load("s", b"a", 10)
    rig.store.decided.put_nowait(([b"a"], []))
    assert await rig.answer("s") == 1
    await rig.loader.ended()
    assert rig.store.let_go_of == []


async def test_layers_are_copied_ahead_and_not_again(rig: Rig) -> None:
    rig.store.in_pool = True
    rig.load("s", b"abc", 10)
    place, elsewhere = PoolPage(1, 2, 3), PoolPage(9, 9, 9)
    for news in ([(b"a", place, 2), (b"b", place, 2)], [(b"a", place, 3), (b"c", elsewhere, 3)]):
        rig.store.partial = [PartialBlock(*one) for one in news]
        rig.store.decided.put_nowait(([], []))
        async with asyncio.timeout(5):
            while rig.store.partial:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    rig.store.decided.put_nowait(([b"a", b"b", b"c"], []))
    assert await rig.answer("s") == 3
    assert rig.store.ahead == [
        ([b"a", b"b"], [[10], [11]], [0, 0]),
        ([b"a", b"c"], [[10], [12]], [2, 0]),
    ]
    assert rig.store.firsts == [3, 2, 0], "what was committed at another place is copied whole"


async def test_what_could_not_be_copied_ahead_is_copied_whole(rig: Rig) -> None:
    rig.store.in_pool = True
    rig.store.not_mapped = {b"b"}
    rig.load("s", b"ab", 10)
    place = PoolPage(1, 2, 3)
    rig.store.partial = [PartialBlock(b"a", place, 2), PartialBlock(b"b", place, 2)]
    rig.store.decided.put_nowait(([], []))
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s") == 2
    assert rig.store.firsts == [2, 0]


async def test_a_request_that_ends_at_once_lets_go_all_the_same() -> None:
    rig = Rig(num_loads=1)
    rig.store.in_pool = True
    rig.loader._loaded = lambda sequence_id, _: rig.loader.cancel(sequence_id)
    rig.load("s", b"ab", 10)
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    async with asyncio.timeout(5):
        while not rig.store.let_go_of:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert rig.store.let_go_of == [{b"a", b"b"}]


def receipt_of(keys: bytes, *, pool_id: int = 1) -> KvReceipt:
    return KvReceipt(pool_id, 3, {k - 97: (40 + k - 97, bytes([k]) * 16) for k in keys})


@pytest.mark.parametrize("begun", [True, False])
async def test_what_the_receipt_names_is_read_without_the_stores_word(
    rig: Rig, begun: bool
) -> None:
    if begun:
        rig.load("s", b"abc", 10)
        await rig.asked(1)
        rig.loader.prefill_done(receipt_of(b"abc"))
    else:
        rig.loader.prefill_done(receipt_of(b"abc"))
        rig.load("s", b"abc", 10)
    assert await rig.answer("s") == 3
    assert rig.pages == {10: b"a" * SIZE, 11: b"b" * SIZE, 12: b"c" * SIZE}
    assert rig.store.asked == ([([b"a", b"b", b"c"], True)] if begun else [])
    assert rig.store.hinted == {b"a", b"b", b"c"}
    assert rig.store.taken[0] == ReadableBlock(b"a", 0, SIZE, b"a" * 16, 4, PoolPage(1, 40, 3))
    await rig.loader.ended()
    assert rig.store.let_go_of == [{b"a", b"b", b"c"}]


async def test_what_the_receipt_does_not_name_is_awaited(rig: Rig) -> None:
    rig.load("s", b"abc", 10)
    rig.store.decided.put_nowait(([b"a"], []))
    await rig.asked(1)
    rig.loader.prefill_done(receipt_of(b"b"))
    rig.store.decided.put_nowait(([b"c"], []))
    assert await rig.answer("s") == 3
    assert rig.store.reads == [b"a", b"b", b"c"]


async def test_a_receipt_of_a_pool_out_of_reach_is_left_aside(rig: Rig) -> None:
    rig.load("s", b"ab", 10)
    await rig.asked(1)
    rig.loader.prefill_done(receipt_of(b"ab", pool_id=2))
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s") == 2
    assert [page.page for block in rig.store.taken if (page := block.pool_page)] == []


@pytest.mark.parametrize("gone", [True, False])
async def test_where_the_receipt_is_out_of_date_the_store_is_asked(rig: Rig, gone: bool) -> None:
    rig.store.gone_pools, rig.store.corrupt = ({1}, set()) if gone else (set(), {b"b"})
    rig.load("s", b"abc", 10)
    await rig.asked(1)
    rig.loader.prefill_done(receipt_of(b"abc"))
    await rig.asked(2)
    assert rig.store.asked[1] == ([b"a", b"b", b"c"] if gone else [b"b", b"c"], True)
    rig.store.corrupt.clear()
    rig.store.decided.put_nowait(([b"a", b"b", b"c"] if gone else [b"b", b"c"], []))
    assert await rig.answer("s") == 3
    assert rig.pages == {10: b"a" * SIZE, 11: b"b" * SIZE, 12: b"c" * SIZE}
    assert [block.pool_page for block in rig.store.taken[-2:]] == [None, None]
    assert rig.store.hinted == (set() if gone else {b"a"})
    assert rig.loader.stats.num_corrupt == 0


async def test_layers_copied_for_a_receipt_that_is_out_of_date_are_copied_anew(rig: Rig) -> None:
    place = PoolPage(1, 40, 3)
    rig.store.partial = [PartialBlock(b"a", place, 2)]
    rig.store.in_pool = True
    rig.load("s", b"ab", 10)
    rig.store.decided.put_nowait(([], []))
    await rig.until(lambda: len(rig.store.ahead) == 1)
    rig.store.corrupt = {b"a"}
    rig.loader.prefill_done(receipt_of(b"ab"))
    await rig.asked(2)
    assert rig.store.firsts == [2, 0]
    rig.store.corrupt.clear()
    rig.store.places[b"a"] = place
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s") == 2
    assert rig.store.firsts == [2, 0, 0, 0]


async def test_a_corrupt_block_of_the_store_ends_the_load(rig: Rig) -> None:
    rig.store.corrupt = {b"b"}
    rig.load("s", b"abc", 10)
    await rig.asked(1)
    rig.loader.prefill_done(receipt_of(b"abc"))
    await rig.asked(2)
    rig.store.decided.put_nowait(([b"b", b"c"], []))
    assert await rig.answer("s") == 1
    assert rig.loader.stats.num_corrupt == 1


@pytest.mark.parametrize("loads_late", [True, False])
async def test_a_choice_that_never_loads_does_not_keep_the_others_blocks(loads_late: bool) -> None:
    rig = Rig(num_loads=2)
    rig.store.in_pool = True
    rig.load("s0", b"ab", 10)
    rig.store.decided.put_nowait(([b"a", b"b"], []))
    assert await rig.answer("s0") == 2
    await rig.loader.ended()
    assert rig.store.let_go_of == []
    rig.loader.cancel("s1")
    if loads_late:
        rig.load("s1", b"ab", 20)
        assert await rig.answer("s1") == 0
    await rig.loader.ended()
    assert rig.store.let_go_of == [{b"a", b"b"}]


async def test_a_choice_that_comes_late_reads_by_the_receipt_too() -> None:
    rig = Rig(num_loads=2)
    rig.load("early", b"ab", 10)
    await rig.asked(1)
    rig.loader.prefill_done(receipt_of(b"ab"))
    assert await rig.answer("early") == 2
    assert rig.store.let_go_of == []
    rig.load("late", b"ab", 20)
    assert await rig.answer("late") == 2
    assert rig.pages[20] == b"a" * SIZE
    await rig.loader.ended()
    assert rig.store.let_go_of == [{b"a", b"b"}]
