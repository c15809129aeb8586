"""Prefill and decode through a real store: exact tokens, and what happens when parts fail."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from splitserve.engine.fake import expected_tokens
from splitserve.errors import SplitserveError
from splitserve.kv.control import StoreControl
from splitserve.kv.keys import chain_keys, root_key
from splitserve.kv.layout import Lease
from splitserve.v1 import prefill_pb2_grpc

from .split import BLOCK, FINGERPRINT, LENGTHS, SPEC, Split, prompt_of


@pytest.fixture
async def split(suite, attach, request):
    """`split` over the transport that the test is parametrised with, `auto` if it is not."""
    transport = getattr(request, "param", "auto")
    store = await suite.kvstore()
    flags = ("--transport", transport)
    prefill, decode = await asyncio.gather(
        suite.prefill(store, *flags), suite.decode(store, *flags)
    )
    parts = Split(suite, store, prefill, decode, attach(decode))
    yield parts
    await parts.close()


both_transports = pytest.mark.parametrize("split", ["shm", "grpc"], indirect=True)


@both_transports
async def test_tokens_are_exact_and_nothing_is_recomputed(split, pages_free):
    for length in LENGTHS:
        prompt = prompt_of(length, salt=length)
        name = f"length-{length}"
        assert await split.run(name, prompt) == expected_tokens(prompt, 8), name
        assert split.attachment.choice(name).cached_tokens == length, name
    await pages_free(split.prefill)
    await pages_free(split.decode)
    counts = await split.control.stats()
    assert (counts.live_leases, counts.reserved_blocks, counts.held_blocks) == (0, 0, 0)
    assert (await split.decode.metrics())["splitserve_generation_tokens_total"] == 6 * 7
    moved = sum(-(-length // BLOCK) for length in LENGTHS) * SPEC.block_bytes
    for service in (split.prefill, split.decode):
        assert (await service.metrics())["splitserve_kv_transfer_bytes_total"] == moved


async def test_many_requests_at_once(split, pages_free):
    prompts = {f"r{i}": prompt_of(20 + 17 * i, salt=i) for i in range(12)}
    outputs = await asyncio.gather(*(split.run(name, prompts[name]) for name in prompts))
    for name, output in zip(prompts, outputs, strict=True):
        assert output == expected_tokens(prompts[name], 8), name
        assert split.attachment.choice(name).cached_tokens == len(prompts[name]), name
    await pages_free(split.decode)


async def test_choices_share_the_prompt_and_draw_their_own_tokens(split, pages_free):
    prompt, lease = prompt_of(5 * BLOCK + 3), await split.lease()
    sampling = {"max_tokens": 4, "n": 3, "temperature": 1.0}
    await split.attachment.submit("a", prompt, lease=lease.to_proto(), **sampling)
    request = split.prefill_request("a", prompt, lease, n=3, max_tokens=4)
    request.sampling.temperature = 1.0
    answer = await split.stub.Prefill(request, timeout=20)
    firsts = [first.token.id for first in answer.first_tokens]
    await split.attachment.start("a", firsts)
    for choice in range(3):
        result = await split.attachment.result("a", choice)
        assert [firsts[choice], *result.tokens] == sampled_tokens(prompt, 4, 7, choice)
        assert result.cached_tokens == len(prompt)
    await pages_free(split.decode)


def sampled_tokens(prompt: list[int], count: int, seed: int, choice: int) -> list[int]:
    """The fake engine's rule for a temperature above 0, by hand."""
    tokens = list(prompt)
    for index in range(count):
        total = sum((p + 1) * t for p, t in enumerate(tokens))
        tokens.append((total + seed + 7 * choice + 3 * index) % 1000)
    return tokens[len(prompt) :]


async def test_start_before_the_blocks_and_submit_after_them(split):
    prompt, lease = prompt_of(4 * BLOCK + 1), await split.lease()
    answer = await split.compute("late", prompt, lease)
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("late", prompt, lease=lease.to_proto())
    await split.attachment.start("late", [first])
    result = await split.attachment.result("late")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == len(prompt)


async def test_a_corrupt_block_is_recomputed(split):
    prompt, lease = prompt_of(4 * BLOCK), await split.lease()
    answer = await split.compute("a", prompt, lease)
    await corrupt(split, lease, prompt, index=1)
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    await split.attachment.start("a", [first])
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == BLOCK, "only the block before the corrupt one was usable"
    await split.control.release([lease])
    assert await split.run("b", prompt) == expected_tokens(prompt, 8)
    assert split.attachment.choice("b").cached_tokens == len(prompt), "the block was written anew"


async def corrupt(split: Split, lease: Lease, prompt: list[int], index: int) -> None:
    """Flip a bit of a committed block in the store's memory."""
    async with split.suite_client() as client:
        keys = chain_keys(root_key(FINGERPRINT, b""), prompt, BLOCK)
        async for ready, missing in client.await_blocks(lease, [keys[index]], True):
            assert not missing
            client.arena[ready[0].arena_offset + 5] ^= 1


async def test_a_lost_store_costs_work_not_answers(split, pages_free, worker_state):
    prompt, lease = prompt_of(6 * BLOCK), await split.lease()
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    await split.suite.kill(split.store)
    answer = await split.compute("a", prompt, lease)
    first = answer.first_tokens[0].token.id
    await split.attachment.start("a", [first])
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    await pages_free(split.prefill)
    await pages_free(split.decode)

    async def told(address: str) -> bool:
        states = [await worker_state(worker) for worker in (split.prefill, split.decode)]
        return all(state.store_address == address for state in states)

    await split.suite.eventually(lambda: told(""))
    await split.suite.kvstore(port=split.store.port)
    async with asyncio.timeout(3):
        attempt = 0
        while True:
            name, attempt = f"again-{attempt}", attempt + 1
            prompt = prompt_of(6 * BLOCK, salt=attempt)
            with contextlib.suppress(SplitserveError):
                assert await split.run(name, prompt) == expected_tokens(prompt, 8)
                if split.attachment.choice(name).cached_tokens == len(prompt):
                    break
        await split.suite.eventually(lambda: told(split.store.address))


async def test_a_lease_that_ends_costs_work_not_answers(split, pages_free):
    prompt, lease = prompt_of(6 * BLOCK), await split.lease(ttl_ms=100)
    await split.attachment.submit("a", prompt, lease=lease.to_proto())

    async def lease_is_over() -> bool:
        return (await split.control.stats()).live_leases == 0

    await split.suite.eventually(lease_is_over)
    answer = await split.compute("a", prompt, lease)
    first = answer.first_tokens[0].token.id
    await split.attachment.start("a", [first])
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == 0
    await pages_free(split.prefill)
    await pages_free(split.decode)


async def test_a_full_store_costs_work_not_answers(suite, attach):
    store = await suite.kvstore(arena_bytes=4096)
    prefill, decode = await asyncio.gather(suite.prefill(store), suite.decode(store))
    split = Split(suite, store, prefill, decode, attach(decode))
    prompt = prompt_of(40 * BLOCK)
    async with asyncio.timeout(5):
        assert await split.run("a", prompt) == expected_tokens(prompt, 8)
    assert split.attachment.choice("a").cached_tokens == 0
    await split.close()


async def test_a_prefix_in_the_store_is_not_computed_again(split):
    prompt = prompt_of(8 * BLOCK + 5)
    await split.run("a", prompt)
    other = await split.suite.prefill(split.store)
    longer = [*prompt[: 8 * BLOCK], *prompt_of(50, salt=9)]
    lease = await split.lease()
    async with other.channel() as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        answer = await stub.Prefill(split.prefill_request("b", longer, lease), timeout=20)
    assert answer.cached_tokens == 8 * BLOCK
    assert answer.first_tokens[0].token.id == expected_tokens(longer, 1)[0]


async def test_the_store_may_come_late(suite, attach, worker_state):
    port = suite.free_port()
    address = f"127.0.0.1:{port}"
    prefill, decode = await asyncio.gather(suite.prefill(address), suite.decode(address))
    assert await prefill.health()
    store = await suite.kvstore(port=port)

    async def workers_have_found_it() -> bool:
        states = [await worker_state(worker) for worker in (prefill, decode)]
        return all(state.store_address == address for state in states)

    await suite.eventually(workers_have_found_it)
    split = Split(suite, store, prefill, decode, attach(decode))
    prompt = prompt_of(100)
    assert await split.run("a", prompt) == expected_tokens(prompt, 8)
    assert split.attachment.choice("a").cached_tokens == len(prompt)
    await split.close()


async def test_a_cancelled_prefill_leaves_nothing(suite, attach, pages_free):
    store = await suite.kvstore()
    prefill = await suite.prefill(
        store, "--fake-step-ms", "50", "--max-step-tokens", "32", "--max-batch", "8"
    )
    control = StoreControl(store.address)
    lease = await control.grant_lease("test", 10_000)
    split = Split(suite, store, prefill, None, None)
    call = split.stub.Prefill(split.prefill_request("a", prompt_of(1000), lease), timeout=20)

    async def hand_over_has_begun() -> bool:
        return (await control.stats()).committed_blocks >= 4

    async def reservations_are_gone() -> bool:
        return (await control.stats()).reserved_blocks == 0

    await suite.eventually(hand_over_has_begun)
    assert not await reservations_are_gone()
    call.cancel()
    await pages_free(prefill)
    await suite.eventually(reservations_are_gone)
    # A deadline that passes is the same.
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await split.stub.Prefill(split.prefill_request("b", prompt_of(999), lease), timeout=0.2)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await pages_free(prefill)
    await control.close()
    await split.close()
