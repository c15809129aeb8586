"""Blocks that stay in the prefill worker's pool until they were read: the fake engine's pool is a
memory file that other processes map, as those of GPUs can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from mmap import mmap
from pathlib import Path

import pytest

from splitserve.engine.fake import expected_tokens
from splitserve.engine.fake_shared import SharedFakeEngine
from splitserve.kv.client import KvStoreClient
from splitserve.kv.keys import chain_keys, root_key
from splitserve.kv.layout import Lease, ReadableBlock
from splitserve.worker.pages import EnginePages

from ..suite import Service
from .split import BLOCK, FINGERPRINT, LAYOUT, LENGTHS, SPEC, Split, prompt_of


@pytest.fixture
async def split(suite, attach, request):
    """The prefill worker shares its pool; `param` is the transport of the decode worker.

    A step takes long enough for blocks to be reserved meanwhile, so that there are receipts.
    """
    transport = getattr(request, "param", "device")
    store = await suite.kvstore()
    prefill, decode = await asyncio.gather(
        suite.prefill(store, "--transport", "device", "--fake-step-ms", "20"),
        suite.decode(store, "--transport", transport),
    )
    parts = Split(suite, store, prefill, decode, attach(decode))
    await pool_is_shared(prefill)
    yield parts
    await parts.close()


async def pool_is_shared(prefill: Service) -> None:
    async with asyncio.timeout(10):
        while "the pool is shared" not in prefill.text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def outcome(split: Split, name: str, prompt: list[int], lease: Lease) -> list[int]:
    """A request whose lease stays live; its tokens."""
    answer = await split.compute(name, prompt, lease)
    first = answer.first_tokens[0].token.id
    await split.attachment.submit(name, prompt, lease=lease.to_proto())
    await split.attachment.start(name, [first])
    return [first, *(await split.attachment.result(name)).tokens]


@contextlib.asynccontextmanager
async def reader(split: Split) -> AsyncIterator[KvStoreClient]:
    """A client that can map the pool."""
    pages = EnginePages(SharedFakeEngine(num_pages=8))
    client = await KvStoreClient.connect(
        split.store.address, worker_id="test", layout=LAYOUT, transport="device", pages=pages
    )
    try:
        yield client
    finally:
        await client.close()


async def blocks_of(client: KvStoreClient, lease: Lease, prompt: list[int]) -> list[ReadableBlock]:
    keys = chain_keys(root_key(FINGERPRINT, b""), prompt, BLOCK)
    blocks: dict[bytes, ReadableBlock] = {}
    async for ready, missing in client.await_blocks(lease, keys, True, timeout_s=5):
        assert missing == []
        blocks.update((block.key, block) for block in ready)
    return [blocks[key] for key in keys]


async def test_tokens_are_exact_and_no_byte_passes_the_store(split, pages_free):
    for length in LENGTHS:
        prompt = prompt_of(length, salt=length)
        name = f"length-{length}"
        assert await split.run(name, prompt) == expected_tokens(prompt, 8), name
        assert split.attachment.choice(name).cached_tokens == length, name
    await pages_free(split.prefill)
    await pages_free(split.decode)
    counts = await split.control.stats()
    assert (counts.used_bytes, counts.committed_blocks, counts.held_blocks) == (0, 0, 0)
    moved = sum(-(-length // BLOCK) for length in LENGTHS) * SPEC.block_bytes
    for service in (split.prefill, split.decode):
        assert (await service.metrics())["splitserve_kv_transfer_bytes_total"] == moved
        assert 'transport="device"' in await asyncio.to_thread(metrics_text, service)


def metrics_text(service: Service) -> str:
    url = f"http://127.0.0.1:{service.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


async def test_many_requests_at_once(split, pages_free):
    prompts = {f"r{i}": prompt_of(20 + 17 * i, salt=i) for i in range(12)}
    outputs = await asyncio.gather(*(split.run(name, prompts[name]) for name in prompts))
    for name, output in zip(prompts, outputs, strict=True):
        assert output == expected_tokens(prompts[name], 8), name
        assert split.attachment.choice(name).cached_tokens == len(prompts[name]), name
    await pages_free(split.prefill)


async def test_pages_are_free_once_read_though_the_lease_lives(split, pages_free):
    prompt, lease = prompt_of(6 * BLOCK), await split.lease()
    assert await outcome(split, "a", prompt, lease) == expected_tokens(prompt, 8)
    assert split.attachment.choice("a").cached_tokens == len(prompt)
    await pages_free(split.prefill)
    assert (await split.control.stats()).live_leases == 1


async def test_with_a_receipt_the_store_is_not_waited_for(split, pages_free):
    await split.run("connects", prompt_of(BLOCK))
    prompt, lease = prompt_of(6 * BLOCK + 3, salt=1), await split.lease()
    answer = await split.compute("a", prompt, lease)
    assert list(answer.kv_receipt.block_indexes) == list(range(7))
    await committed(split, 7)
    split.store.process.send_signal(signal.SIGSTOP)
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    try:
        await split.attachment.start("a", [first], answer)
        result = await split.attachment.result("a")
    finally:
        split.store.process.send_signal(signal.SIGCONT)
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == len(prompt)
    await pages_free(split.prefill)


@pytest.mark.parametrize("wrong", ["page", "no such page", "digest", "length"])
async def test_a_wrong_receipt_costs_nothing_but_time(split, wrong, pages_free):
    prompt, lease = prompt_of(4 * BLOCK), await split.lease()
    answer = await split.compute("a", prompt, lease)
    receipt = answer.kv_receipt
    match wrong:
        case "page":
            receipt.pages[1] = receipt.pages[2]
        case "no such page":
            receipt.pages[1] = 2**32 - 1
        case "digest":
            receipt.digests = receipt.digests[:-1] + b"?"
        case "length":
            receipt.digests = receipt.digests[:-1]
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    await split.attachment.start("a", [first], answer)
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == len(prompt)
    await split.control.release([lease])
    await pages_free(split.prefill)


async def test_all_choices_read_before_the_pages_are_free(split, pages_free):
    prompt, lease = prompt_of(5 * BLOCK + 3), await split.lease()
    await split.attachment.submit("a", prompt, lease=lease.to_proto(), n=3, max_tokens=4)
    answer = await split.compute("a", prompt, lease, n=3, max_tokens=4)
    firsts = [first.token.id for first in answer.first_tokens]
    await split.attachment.start("a", firsts, answer)
    for choice in range(3):
        result = await split.attachment.result("a", choice)
        assert [firsts[choice], *result.tokens] == expected_tokens(prompt, 4)
        assert result.cached_tokens == len(prompt)
    await pages_free(split.prefill)


async def test_the_end_of_the_lease_frees_the_pages(split, worker_state, pages_free):
    ttl_s = 0.6
    began = time.monotonic()
    prompt, lease = prompt_of(6 * BLOCK + 1), await split.lease(ttl_ms=round(ttl_s * 1000))
    await split.compute("a", prompt, lease)
    state = await worker_state(split.prefill)
    assert state.total_pages - state.free_pages == 7
    assert (await split.control.stats()).held_blocks == 7
    await pages_free(split.prefill)
    assert ttl_s < time.monotonic() - began < ttl_s + 1.0


async def test_a_corrupt_page_is_recomputed(split, pages_free):
    prompt, lease = prompt_of(4 * BLOCK), await split.lease()
    answer = await split.compute("a", prompt, lease)
    async with reader(split) as client:
        places = [block.pool_page for block in await blocks_of(client, lease, prompt)]
        assert None not in places
        with open_pool(split.prefill) as pool:
            pool[places[1].page * SPEC.block_bytes + 5] ^= 1
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    await split.attachment.start("a", [first])
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == BLOCK, "only the block before the corrupt one was usable"
    await pages_free(split.prefill)


async def committed(split: Split, num_blocks: int) -> None:
    async def holds() -> bool:
        return (await split.control.stats()).committed_blocks == num_blocks

    await split.suite.eventually(holds)


@contextlib.contextmanager
def open_pool(prefill: Service):
    directory = f"/proc/{prefill.pid}/fd"
    paths = [f"{directory}/{fd}" for fd in os.listdir(directory)]
    path = next(path for path in paths if "splitserve-fake-pool" in os.readlink(path))
    with open(path, "r+b") as file, mmap(file.fileno(), 0) as pool:
        yield pool


async def test_a_worker_that_dies_before_its_pages_are_read_costs_work_not_answers(
    split, pages_free
):
    prompt, lease = prompt_of(6 * BLOCK), await split.lease()
    answer = await split.compute("a", prompt, lease)
    await committed(split, 6)
    assert num_mapped(split.decode) == 2
    await split.suite.kill(split.prefill)
    first = answer.first_tokens[0].token.id
    await split.attachment.submit("a", prompt, lease=lease.to_proto())
    await split.attachment.start("a", [first])
    result = await split.attachment.result("a")
    assert [first, *result.tokens] == expected_tokens(prompt, 8)
    assert result.cached_tokens == 0
    assert (await split.control.stats()).committed_blocks == 0
    await pages_free(split.decode)

    async def unmapped() -> bool:
        return num_mapped(split.decode) == 1

    await split.suite.eventually(unmapped)  # a dead worker's memory must not be held


def num_mapped(service: Service) -> int:
    """Pools in a process's memory, its own included."""
    maps = Path(f"/proc/{service.pid}/maps").read_text().splitlines()
    return sum("splitserve-fake-pool" in line for line in maps)


async def test_a_store_that_dies_frees_the_pages(split, pages_free):
    prompt, lease = prompt_of(6 * BLOCK), await split.lease(ttl_ms=60_000)
    await split.compute("a", prompt, lease)
    await committed(split, 6)
    await split.suite.kill(split.store)
    await pages_free(split.prefill)


@pytest.mark.parametrize("split", ["shm", "grpc"], indirect=True)
@pytest.mark.parametrize("early", [True, False])
async def test_a_reader_that_cannot_map_the_pool_gets_the_blocks(split, early, pages_free):
    prompt = prompt_of(6 * BLOCK + 5)
    if early:
        tokens = await split.run("a", prompt)
    else:
        lease = await split.lease()
        tokens = await outcome(split, "a", prompt, lease)
        await split.control.release([lease])
    assert tokens == expected_tokens(prompt, 8)
    assert split.attachment.choice("a").cached_tokens == len(prompt)
    await pages_free(split.prefill)


async def test_a_prefix_in_a_pool_is_not_computed_again(split, suite):
    prompt, lease = prompt_of(8 * BLOCK), await split.lease()
    await split.compute("a", prompt, lease)
    await committed(split, 8)
    other = await suite.prefill(split.store, "--transport", "device")
    second = Split(suite, split.store, other, None, None)
    longer = [*prompt, *prompt_of(50, salt=9)]
    answer = await second.compute("b", longer, await split.lease())
    assert answer.cached_tokens == 8 * BLOCK
    assert answer.first_tokens[0].token.id == expected_tokens(longer, 1)[0]
    await second.close()
