"""What no router or worker sends, sent straight to the tiers: typed refusals, and nothing held."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import grpc
import pytest

from splitserve.engine.fake import expected_tokens
from splitserve.kv.codec import DIGEST_BYTES
from splitserve.kv.control import StoreControl
from splitserve.v1 import (
    common_pb2,
    decode_pb2,
    inference_pb2,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
)

from ..suite import Service, Suite, eventually

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ENDED = grpc.StatusCode.FAILED_PRECONDITION
TOO_MUCH = grpc.StatusCode.RESOURCE_EXHAUSTED
OK = grpc.StatusCode.OK
PROMPT = [5 + i % 40 for i in range(50)]
CONTEXT = 256
NOISE = b"\xff\xff\xff"

TIERS = {
    "router": (inference_pb2,),
    "prefill": (prefill_pb2, worker_pb2),
    "decode": (decode_pb2, worker_pb2),
    "kvstore": (kvstore_pb2,),
}


async def code_of(call: Awaitable[Any] | AsyncIterator[Any]) -> grpc.StatusCode:
    """The status that a call of any kind ends with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


def code_of_choice(choice: Any) -> grpc.StatusCode:
    assert choice.error is not None
    return {code.value[0]: code for code in grpc.StatusCode}[choice.error.code]


def methods(tier: str) -> list[tuple[str, bool, bool]]:
    """Full name of each method, and whether requests and responses are streams."""
    return [
        (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming)
        for module in TIERS[tier]
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


def send(channel: grpc.aio.Channel, method: tuple[str, bool, bool], message: bytes) -> Any:
    path, client_streaming, server_streaming = method
    if client_streaming:
        make = channel.stream_stream if server_streaming else channel.stream_unary
        return make(path)([message], timeout=5)
    make = channel.unary_stream if server_streaming else channel.unary_unary
    return make(path)(message, timeout=5)


async def test_bytes_that_are_no_message_on_every_method(suite: Suite) -> None:
    store = await suite.kvstore()
    prefill, decode = await asyncio.gather(suite.prefill(store), suite.decode(store))
    router = await suite.router([prefill], [decode], "--skip-tokenizer-init", "--model-name=fake")
    tiers = {"router": router, "prefill": prefill, "decode": decode, "kvstore": store}
    codes = {}
    for tier, service in tiers.items():
        async with service.channel() as channel:
            for method in methods(tier):
                codes[tier, method[0]] = await code_of(send(channel, method, NOISE))
            codes[tier, "unknown"] = await code_of(
                channel.unary_unary("/splitserve.v1.Nothing/Nothing")(b"", timeout=5)
            )
    unknown = {key: codes.pop(key) for key in list(codes) if key[1] == "unknown"}
    assert set(unknown.values()) == {grpc.StatusCode.UNIMPLEMENTED}
    assert codes == dict.fromkeys(codes, INVALID)
    assert len(codes) == 24
    for service in tiers.values():
        assert await service.health()
        assert "Traceback" not in service.text()
    await prefill.pages_free()
    await decode.pages_free()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def strange_leases(store: Service, silent_port: int, granted: Any) -> dict[str, Any]:
    """Leases that were never granted, or by nobody who could be reached."""

    def lease(address: str, lease_id: str = "made-up", epoch: int = 1) -> common_pb2.LeaseRef:
        return common_pb2.LeaseRef(lease_id=lease_id, epoch=epoch, store_address=address)

    return {
        "unknown": lease(store.address, "made-up", granted.epoch),
        "other epoch": lease(store.address, granted.lease_id, granted.epoch ^ 1),
        "no name": lease(store.address, "", granted.epoch),
        "nothing set": common_pb2.LeaseRef(),
        "nobody there": lease("127.0.0.1:1"),
        "no store": lease(store.address.replace(str(store.port), str(store.metrics_port))),
        "silent": lease(f"127.0.0.1:{silent_port}"),
        "no such host": lease("nowhere.invalid:1"),
    }


NO_LEASES = {
    "no address": common_pb2.LeaseRef(lease_id="a", store_address="not an address"),
    "NUL": common_pb2.LeaseRef(lease_id="a", store_address="127.0.0.1\0:1"),
    "a file": common_pb2.LeaseRef(lease_id="a", store_address="unix:///etc/passwd"),
    "a scheme": common_pb2.LeaseRef(lease_id="a", store_address="http://127.0.0.1:1/"),
    "long": common_pb2.LeaseRef(lease_id="a", store_address="x" * 100_000 + ":1"),
    "long name": common_pb2.LeaseRef(lease_id="x" * 100_000),
}


def prefill_request(request_id: str = "a", prompt: list[int] = PROMPT, **fields: Any) -> Any:
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=4, seed=7, ignore_eos=True)
    return prefill_pb2.PrefillRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=sampling, **fields
    )


async def test_leases_that_never_were_cost_no_answer(
    suite: Suite, attach: Any, silent_port: int
) -> None:
    store = await suite.kvstore()
    flags = ("--max-context-tokens", str(CONTEXT))
    prefill, decode = await asyncio.gather(
        suite.prefill(store, *flags), suite.decode(store, *flags)
    )
    control, router = StoreControl(store.address), attach(decode)
    granted = await control.grant_lease("test", 60_000)
    leases = strange_leases(store, silent_port, granted)
    prompts = {name: [index, *PROMPT] for index, name in enumerate(leases)}
    async with prefill.channel() as channel, asyncio.timeout(20):
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)

        async def serve(name: str, lease: Any) -> None:
            expected = expected_tokens(prompts[name], 4)
            await router.submit(name, prompts[name], lease=lease, max_tokens=4)
            answer = await stub.Prefill(prefill_request(name, prompts[name], lease=lease))
            first = answer.first_tokens[0].token.id
            assert first == expected[0], name
            await router.start(name, [first])
            assert (await router.result(name)).tokens == expected[1:], name

        await asyncio.gather(*(serve(name, lease) for name, lease in leases.items()))
    await prefill.pages_free()
    await decode.pages_free()
    await control.release([granted])
    stats = await control.stats()
    assert (stats.live_leases, stats.held_blocks, stats.reserved_blocks) == (0, 0, 0)
    for service in (prefill, decode):
        assert "Traceback" not in service.text()
    await control.close()


async def test_prefill_requests_that_cannot_be(suite: Suite) -> None:
    prefill = await suite.prefill("127.0.0.1:1", "--max-context-tokens", str(CONTEXT))
    unseeded, many, none = prefill_request(), prefill_request(), prefill_request()
    unseeded.sampling.ClearField("seed")
    many.sampling.n, none.sampling.n = 2**31 - 1, 0
    refused = {
        "no sampling": prefill_pb2.PrefillRequest(request_id="a", prompt_token_ids=[1]),
        "nothing": prefill_pb2.PrefillRequest(),
        "no name": prefill_request(""),
        "long name": prefill_request("x" * 1_000_000),
        "no seed": unseeded,
        "n huge": many,
        "n 0": none,
        "token out of range": prefill_request(prompt=[2**32 - 1]),
        **{f"lease: {name}": prefill_request(lease=lease) for name, lease in NO_LEASES.items()},
        "million tokens": prefill_request(prompt=[1] * 1_000_000),
    }
    async with prefill.channel() as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        codes = {name: await code_of(stub.Prefill(r, timeout=5)) for name, r in refused.items()}
        assert codes == dict.fromkeys(refused, INVALID)
        over = prefill_request(prompt=[1] * 5_000_000)
        assert await code_of(stub.Prefill(over, timeout=5)) is TOO_MUCH
        salted = prefill_request(cache_salt=b"s" * 1_000_000)
        first = (await stub.Prefill(salted, timeout=5)).first_tokens[0]
        assert [first.token.id] == expected_tokens(PROMPT, 1)
    await prefill.pages_free()


async def test_commands_that_cannot_be_end_only_themselves(suite: Suite, attach: Any) -> None:
    flags = ("--max-context-tokens", str(CONTEXT), "--fake-step-ms", "5")
    decode = await suite.decode("127.0.0.1:1", *flags)
    router = attach(decode)
    await router.submit("good", PROMPT, max_tokens=150)
    long_name = "x" * 1_000_000
    progress = decode_pb2.ChoiceProgress
    refused: dict[str, dict[str, Any]] = {
        "long lived": {"n": 2**31 - 1},
        "no seed": {"seed": None},
        "n 0": {"n": 0},
        "n negative": {"n": -5},
        "tokens": {"prompt": [1, 1000]},
        "logprobs": {"logprobs": 21},
        "named twice": {"resume": [progress(index=0), progress(index=0)]},
        "resume past the context": {
            "max_tokens": None,
            "resume": [progress(token_ids=[1] * (CONTEXT - 10))],
        },
        **{f"lease: {name}": {"lease": lease} for name, lease in NO_LEASES.items()},
        "resume of the unknown": {"resume": [progress(index=2**32 - 1)]},
    }
    for name, fields in refused.items():
        await router.submit(name, **{"prompt": PROMPT, **fields})
        assert code_of_choice(await router.result(name)) is INVALID, name
    # The refusal of each of many choices repeats the name; it must still fit a message.
    await router.submit(long_name, PROMPT, n=64)
    await router.submit("", PROMPT)
    assert code_of_choice(await router.result("")) is INVALID
    for request_id in ("good", "nobody", long_name):
        await router.cancel(request_id, 2**32 - 1)
    await router.start("nobody", [1] * 1000)
    assert code_of_choice(await router.result("nobody")) is grpc.StatusCode.NOT_FOUND
    await router.submit("far", PROMPT, max_tokens=2, timeout_ms=2**32 - 1)
    assert (await router.result("far")).tokens == expected_tokens(PROMPT, 2)
    garbage = {"traceparent": "\0" * 100, "tracestate": "=" * 10_000, "": ""}
    await router.submit("traced", PROMPT, max_tokens=2, trace_context=garbage)
    assert (await router.result("traced")).tokens == expected_tokens(PROMPT, 2)
    assert (await router.result("good")).tokens == expected_tokens(PROMPT, 150)
    await decode.pages_free()
    assert "Traceback" not in decode.text()


async def test_floods_of_commands_for_nobody(suite: Suite, attach: Any) -> None:
    decode = await suite.decode("127.0.0.1:1", "--max-context-tokens", str(CONTEXT))
    router, other = attach(decode), attach(decode)
    for index in range(2000):
        await router.cancel(f"c{index}")
        await router.start(f"s{index}", [1])
    assert code_of_choice(await router.result("s1999")) is grpc.StatusCode.NOT_FOUND
    await other.submit("good", PROMPT)
    assert (await other.result("good")).tokens == expected_tokens(PROMPT, 8)
    await decode.pages_free()


def key(index: int) -> bytes:
    return index.to_bytes(32, "little")


async def test_calls_of_the_store_that_cannot_be(suite: Suite) -> None:
    store = await suite.kvstore()
    control = StoreControl(store.address)
    lease = (await control.grant_lease("test", 60_000)).to_proto()
    stale = common_pb2.LeaseRef(lease_id=lease.lease_id, epoch=lease.epoch ^ 1)
    kv = kvstore_pb2
    spec, part = kv.BlockSpec, kv.WriteBlocksRequest
    good = spec(key=key(0), size_bytes=4096, num_tokens=16)
    huge = spec(key=key(1), size_bytes=2**63, num_tokens=16)
    commit = kv.BlockCommit(key=key(9), digest=b"d" * DIGEST_BYTES)
    fits_not = [spec(key=key(i), size_bytes=1 << 20, num_tokens=16) for i in range(2, 40)]
    out_of_range, not_found = grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.NOT_FOUND
    rows: list[tuple[str, Any, grpc.StatusCode]] = [
        ("ReserveBlocks", kv.ReserveBlocksRequest(lease=stale, blocks=[good]), ENDED),
        ("ReserveBlocks", kv.ReserveBlocksRequest(lease=lease, blocks=[huge]), INVALID),
        ("ReserveBlocks", kv.ReserveBlocksRequest(lease=lease, blocks=fits_not), TOO_MUCH),
        ("ReserveBlocks", kv.ReserveBlocksRequest(blocks=[good]), INVALID),
        ("WriteBlocks", [part(lease=stale, key=key(0))], ENDED),
        ("WriteBlocks", [part(key=key(0), data=b"x")], INVALID),
        ("WriteBlocks", [part(lease=lease, key=key(0)[:31])], INVALID),
        (
            "WriteBlocks",
            [part(lease=lease, key=key(0), offset_bytes=4096, data=b"x")],
            out_of_range,
        ),
        ("WriteBlocks", [part(lease=lease, key=key(0)), part(key=key(7), data=b"y")], ENDED),
        ("CommitBlocks", kv.CommitBlocksRequest(lease=stale, blocks=[commit]), ENDED),
        ("CommitBlocks", kv.CommitBlocksRequest(lease=lease, blocks=[commit]), ENDED),
        (
            "CommitBlocks",
            kv.CommitBlocksRequest(lease=lease, blocks=[commit], in_pool=kv.PoolCommit()),
            INVALID,
        ),
        *(
            ("CommitBlocks", kv.CommitBlocksRequest(lease=lease, in_pool=in_pool), INVALID)
            for in_pool in (
                kv.PoolCommit(pool_id=7, keys=key(0), pages=[1], digests=b"d" * DIGEST_BYTES),
                kv.PoolCommit(keys=key(0)[:31], pages=[1], digests=b"d" * DIGEST_BYTES),
                kv.PoolCommit(keys=key(0), pages=[1, 2], digests=b"d" * DIGEST_BYTES),
                kv.PoolCommit(keys=key(0), pages=[1], digests=b"d" * (DIGEST_BYTES - 1)),
                kv.PoolCommit(pages=[1] * 70_000),
            )
        ),
        ("AbandonBlocks", kv.AbandonBlocksRequest(lease=stale, keys=[key(0)]), ENDED),
        ("AbandonBlocks", kv.AbandonBlocksRequest(lease=lease, keys=[key(8)] * 3), OK),
        ("AwaitBlocks", kv.AwaitBlocksRequest(lease=stale, keys=[key(0)]), ENDED),
        ("AwaitBlocks", kv.AwaitBlocksRequest(lease=lease, keys=[key(8)] * 9), OK),
        ("AwaitBlocks", kv.AwaitBlocksRequest(lease=lease, keys=[b""]), INVALID),
        ("ReadBlocks", kv.ReadBlocksRequest(lease=lease, keys=[key(0)]), not_found),
        ("LookupBlocks", kv.LookupBlocksRequest(keys=[key(0)] * 65_537), INVALID),
        ("LookupBlocks", kv.LookupBlocksRequest(keys=[key(0)] * 1_000_000), TOO_MUCH),
        ("GrantLease", kv.GrantLeaseRequest(owner="o" * 300, ttl_ms=10), INVALID),
        ("RenewLeases", kv.RenewLeasesRequest(leases=[stale] * 9, ttl_ms=1000), OK),
        ("ReleaseLeases", kv.ReleaseLeasesRequest(leases=[stale] * 9), OK),
    ]
    async with store.channel() as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        await stub.ReserveBlocks(kv.ReserveBlocksRequest(lease=lease, blocks=[good]), timeout=5)
        before = await control.stats()
        for index, (method, request, code) in enumerate(rows):
            call = getattr(stub, method)(request, timeout=5)
            assert await code_of(call) is code, (index, method)
        assert await control.stats() == before
        await stub.ReleaseLeases(kv.ReleaseLeasesRequest(leases=[lease]), timeout=5)

    async def empty() -> bool:
        stats = await control.stats()
        return (stats.live_leases, stats.held_blocks, stats.used_bytes) == (0, 0, 0)

    await eventually(empty)
    assert "Traceback" not in store.text()
    await control.close()
