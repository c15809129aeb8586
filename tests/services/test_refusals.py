"""What a suite refuses that it could serve at another time, for another caller, or elsewhere."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from splitserve.engine.fake import expected_tokens
from splitserve.v1 import inference_pb2

from ..suite import Suite
from .front_door import CONTEXT, PROMPT, FrontDoor, Request, detail_of, front_door, ids_of, tokens

OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
NOWHERE = "127.0.0.1:1"


async def status_of(
    door: FrontDoor, request: Request | None = None, **options: object
) -> grpc.StatusCode:
    try:
        await door.ask(request or tokens(), **options)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return OK


async def test_a_full_queue_says_when_to_come_back(suite: Suite) -> None:
    slow = ("--fake-step-ms", "20")
    only_one = ("--max-running", "1", "--max-waiting", "0")
    async with front_door(suite, router_flags=only_one, worker_flags=slow) as door:
        running = door.stub.Generate(tokens(max_tokens=128), timeout=20)
        await running.read()
        refused = await door.send(tokens())
        assert refused is not None
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        retry = detail_of(refused, error_details_pb2.RetryInfo)
        assert 0 < retry.retry_delay.ToMilliseconds() <= 60_000
        running.cancel()
        await door.router.until_metric("splitserve_num_requests_running", lambda count: count == 0)
        await door.assert_unharmed()


async def test_a_prompt_that_no_pool_can_hold(suite: Suite) -> None:
    small = ("--pool-bytes", str(8 * 512))  # eight pages of sixteen tokens
    async with front_door(suite, worker_flags=small) as door:
        refused = await door.send(tokens([1] * 200))
        assert refused is not None
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "pages" in str(refused.details())
        await door.assert_unharmed()


async def test_tiers_that_are_gone(suite: Suite) -> None:
    async with front_door(suite, router_flags=("--worker-wait-s", "0.2")) as door:
        # Without a prefill tier prompts are computed where they decode.
        await suite.kill(door.prefill)
        assert ids_of(await door.ask(tokens())) == expected_tokens(PROMPT, 4)
        await suite.kill(door.decode)
        refused = await door.send(tokens())
        assert refused is not None
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "decode worker" in str(refused.details())
        # What can never be served is told as before.
        assert await status_of(door, tokens(n=0)) is grpc.StatusCode.INVALID_ARGUMENT
        assert await status_of(door, tokens(model="other")) is grpc.StatusCode.NOT_FOUND


async def test_a_router_that_never_had_a_worker(suite: Suite) -> None:
    nobody = ("--prefill", NOWHERE, "--decode", NOWHERE, "--skip-tokenizer-init")
    router = await suite.start("router", *nobody, "--worker-wait-s", "0.2", wait=False)
    assert not await router.health()
    async with router.channel() as channel:
        door = FrontDoor(suite, router, router, router, router, channel, None)
        assert await status_of(door) is grpc.StatusCode.UNAVAILABLE
        assert await status_of(door, tokens([])) is grpc.StatusCode.INVALID_ARGUMENT
        text = Request(text="hello")
        assert await status_of(door, text) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_router_that_knows_no_limits_leaves_them_to_the_workers(suite: Suite) -> None:
    """Without a checkpoint nothing tells the vocabulary but the workers' refusals."""
    store = await suite.kvstore()
    context = ("--max-context-tokens", str(CONTEXT))
    prefill = await suite.prefill(store, *context)
    decode = await suite.decode(store, *context)
    flags = ("--skip-tokenizer-init", "--model-name", "fake")
    router = await suite.router([prefill], [decode], *flags)
    async with router.channel() as channel:
        door = FrontDoor(suite, store, prefill, decode, router, channel, None)
        for prompt in ([1000], [1000] * 100):  # computed by the decode and the prefill worker
            refused = await door.send(tokens(prompt))
            assert refused is not None
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "1000" in str(refused.details())
        assert ids_of(await door.ask(tokens())) == expected_tokens(PROMPT, 4)
        await prefill.pages_free()
        await decode.pages_free()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("red:key-red\nblue:key-blue\n")
    return path


def bearer(value: str) -> dict[str, object]:
    return {"metadata": [("authorization", value)]}


async def test_keys_are_asked_for(suite: Suite, keys_file: Path) -> None:
    async with front_door(suite, router_flags=("--api-keys-file", str(keys_file))) as door:
        assert await status_of(door) is UNAUTHENTICATED
        # Whoever has no key learns nothing of models and limits.
        assert await status_of(door, tokens(model="other")) is UNAUTHENTICATED
        assert await status_of(door, tokens(n=0)) is UNAUTHENTICATED
        for wrong in ("", "key-red", "Bearer", "Bearer key-rec", "Basic key-red", "Bearer " * 99):
            assert await status_of(door, **bearer(wrong)) is UNAUTHENTICATED
        for call in (door.stub.ListModels(inference_pb2.ListModelsRequest()),):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is UNAUTHENTICATED
        answer = await door.ask(tokens(), **bearer("Bearer key-red"))
        assert ids_of(answer) == expected_tokens(PROMPT, 4)
        assert "key-red" not in door.router.text()


@pytest.mark.parametrize("shared", [False, True])
async def test_tenants_share_a_cache_only_if_told_to(
    suite: Suite, keys_file: Path, shared: bool
) -> None:
    flags = ("--api-keys-file", str(keys_file), *(["--share-cache-between-tenants"] * shared))
    async with front_door(suite, router_flags=flags) as door:

        async def cached(key: str) -> int:
            messages = await door.ask(tokens([*PROMPT, 5]), **bearer(f"Bearer {key}"))
            assert ids_of(messages) == expected_tokens([*PROMPT, 5], 4)
            return messages[-1].usage.cached_prompt_tokens

        assert await cached("key-red") == 0
        assert await cached("key-red") >= 48, "a tenant has a cache of its own"
        blue = await cached("key-blue")
        assert blue >= 48 if shared else blue == 0
