"""What is kept of addresses that no worker has or names any more."""

from __future__ import annotations

import asyncio
from typing import Any

from services.router.pruning import prune_forever

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


async def test_what_a_request_uses_is_kept(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--canary-interval-s=600"])
    links, stores = suite.router.links, suite.router.stores
    suite.decode.hold_at = 1
    call = suite.stub.Generate(tools.make_request(max_tokens=5), timeout=10)
    first = await call.read()
    await links.prune([])
    await stores.prune([])
    assert (links.num_links, stores.num_stores) == (1, 1)
    suite.decode.release()
    messages = [first, *await tools.rest_of(call)]
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
    await suite.assert_nothing_left()


async def test_what_is_idle_and_not_named_goes_and_comes_back(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--canary-interval-s=600"])
    links, stores = suite.router.links, suite.router.stores
    await links.prune(suite.router.pools[1].known())
    await stores.prune([suite.store.address])
    assert (links.num_links, stores.num_stores) == (1, 1)
    await links.prune([])
    await stores.prune(["127.0.0.1:1"])
    assert (links.num_links, stores.num_stores) == (0, 0)
    assert tools.token_ids(await suite.generate(max_tokens=5)) == tools.tokens_after(PROMPT, 5)
    assert suite.decode.submits[0].HasField("lease")
    await suite.assert_nothing_left()


async def test_a_call_under_way_keeps_its_store(start_suite: Any) -> None:
    suite = await start_suite(flags=["--canary-interval-s=600"])
    stores, arrived, gate = suite.router.stores, asyncio.Event(), asyncio.Event()
    lookup = suite.store.LookupBlocks

    async def slow(request: Any, context: Any) -> Any:
        arrived.set()
        await gate.wait()
        return await lookup(request, context)

    suite.store.LookupBlocks = slow
    await suite.kill(suite.store.address)
    await suite.bring_back(suite.store.address)
    suite.store.holders = {"decode-0": 2}
    asking = asyncio.create_task(stores.lookup([suite.store.address], [b"k" * 32]))
    await asyncio.wait_for(arrived.wait(), 5)
    await stores.prune([])
    gate.set()
    assert await asking == {"decode-0": 2}
    await stores.prune([])
    assert stores.num_stores == 0


async def test_workers_that_have_left_are_forgotten(start_suite: Any) -> None:
    suite = await start_suite(flags=["--canary-interval-s=600"])
    router = suite.router
    pruning = asyncio.create_task(
        prune_forever(router.pools, router.links, router.stores, interval_s=0.01)
    )
    await suite.kill(suite.decode.address)
    await suite.until(lambda: router.links.num_links == 0)
    assert router.stores.num_stores == 1
    await suite.kill(suite.prefill.address)
    await suite.until(lambda: router.stores.num_stores == 0)
    pruning.cancel()
    await asyncio.wait({pruning})
