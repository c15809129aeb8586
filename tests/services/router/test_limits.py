"""What the router refuses, and how it says so."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from splitserve.v1 import inference_pb2, inference_pb2_grpc

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


async def error_of(suite: Any, request: Any, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in suite.stub.Generate(request, timeout=5, **options):
            pass
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


def fields_of(error: grpc.aio.AioRpcError) -> set[str]:
    return {v.field for v in detail(error, error_details_pb2.BadRequest).field_violations}


BAD_SAMPLING = {
    "temperature": [math.nan, math.inf, -0.1],
    "top_p": [0.0, 1.1, math.nan],
    "top_k": [-1],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, 10.5, -1.0],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "max_tokens": [0, -1, 4097],
    "min_tokens": [-1, 100],
    "n": [0, -1, 17],
    "logprobs": [-1, 21],
    "stop": [[""], ["x"] * 17, ["x" * 257]],
    "stop_token_ids": [[1000], [1] * 65],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SAMPLING.items() for value in values]
)
async def test_sampling_out_of_range(shared_suite: Any, name: str, value: Any) -> None:
    error = await error_of(shared_suite, shared_suite.make_request(**{name: value}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    # A wrong max_tokens may exceed the context as well.
    assert fields_of(error) - {"tokens.ids"} == {f"sampling.{name}"}


async def test_min_tokens_that_the_context_has_no_room_for(shared_suite: Any) -> None:
    def request(min_tokens: int) -> Any:
        made = shared_suite.make_request(prompt=[7] * 500, min_tokens=min_tokens)
        made.sampling.ClearField("max_tokens")
        return made

    error = await error_of(shared_suite, request(13))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(error) == {"sampling.min_tokens"}
    messages = [message async for message in shared_suite.stub.Generate(request(12), timeout=5)]
    assert messages[-1].usage.completion_tokens == 12


BAD_SHAPES = {
    "prompt": inference_pb2.GenerateRequest(),
    "text": inference_pb2.GenerateRequest(text="hello"),
    "tokens.ids": inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt()),
    "chat.messages": inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt()),
    "chat.messages[1].role": inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatPrompt(
            messages=[
                inference_pb2.ChatMessage(role="user", content="a"),
                inference_pb2.ChatMessage(role="wizard", content="b"),
            ]
        )
    ),
    "chat": inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatPrompt(
            messages=[inference_pb2.ChatMessage(role="user", content="a")]
        )
    ),
}


@pytest.mark.parametrize("field", BAD_SHAPES)
async def test_bad_prompt(shared_suite: Any, field: str) -> None:
    error = await error_of(shared_suite, BAD_SHAPES[field])
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(error) == {field}


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [([1] * 505, 8), ([1] * 513, 1), ([1000], 8), ([2**32 - 1], 8)]
)
async def test_prompt_tokens_that_cannot_be(
    shared_suite: Any, prompt: list[int], max_tokens: int
) -> None:
    request = shared_suite.make_request(prompt=prompt, max_tokens=max_tokens)
    error = await error_of(shared_suite, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(error) == {"tokens.ids"}


async def test_all_violations_are_named(shared_suite: Any) -> None:
    request = shared_suite.make_request(prompt=[1000], top_p=2.0, n=0, request_id="é")
    error = await error_of(shared_suite, request)
    assert fields_of(error) == {"request_id", "sampling.top_p", "sampling.n"}
    request.request_id = ""
    error = await error_of(shared_suite, request)
    assert fields_of(error) == {"tokens.ids", "sampling.top_p", "sampling.n"}


@pytest.mark.parametrize("model", ["other", "../toy", "toy\0", "toy/../toy", "x" * 10_000])
async def test_unknown_model(shared_suite: Any, model: str) -> None:
    error = await error_of(shared_suite, shared_suite.make_request(model=model))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_message_over_the_limit(shared_suite: Any) -> None:
    request = inference_pb2.GenerateRequest(text="x" * (5 << 20))
    error = await error_of(shared_suite, request)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_malformed_message_does_no_harm(shared_suite: Any, tools: Any) -> None:
    call = shared_suite.channel.unary_stream("/splitserve.v1.InferenceService/Generate")
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in call(b"\xff\xff\xff", timeout=5):
            pass
    messages = await shared_suite.generate(max_tokens=3)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 3)


async def test_nothing_is_left_of_refusals(shared_suite: Any) -> None:
    await error_of(shared_suite, shared_suite.make_request(n=0))
    await shared_suite.assert_nothing_left()


@pytest.fixture
async def shared_suite(start_suite: Any) -> Any:
    return await start_suite(wait_ready=True)


async def test_queue_of_requests(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--max-running=1", "--max-waiting=1"])
    suite.decode.hold_at = 2
    running = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await running.read()
    waiting = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await suite.until(lambda: suite.router.admission.waiting == 1)
    error = await error_of(suite, tools.make_request())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = detail(error, error_details_pb2.RetryInfo)
    assert 0 < retry.retry_delay.ToMilliseconds() <= 60_000
    suite.decode.release()
    await tools.rest_of(running)
    assert tools.token_ids([m async for m in waiting]) == tools.tokens_after(PROMPT, 4)
    await suite.assert_nothing_left()


async def test_queue_of_tokens(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--max-queued-tokens=10"])
    suite.prefill.gate.clear()
    # Over the limit on its own, but alone.
    first = asyncio.create_task(suite.generate(prompt=[5] * 20, max_tokens=3))
    await suite.until(lambda: len(suite.prefill.requests) == 1)
    error = await error_of(suite, tools.make_request(prompt=[5]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error, error_details_pb2.RetryInfo) is not None
    suite.prefill.gate.set()
    assert tools.token_ids(await first) == tools.tokens_after([5] * 20, 3)
    assert await suite.generate(prompt=[5], max_tokens=3)
    await suite.assert_nothing_left()


async def test_cancelled_while_waiting(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--max-running=1"])
    suite.decode.hold_at = 2
    running = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await running.read()
    waiting = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await suite.until(lambda: suite.router.admission.waiting == 1)
    waiting.cancel()
    await suite.until(lambda: suite.router.admission.waiting == 0)
    suite.decode.release()
    await tools.rest_of(running)
    await suite.assert_nothing_left()


async def test_client_that_does_not_read_is_given_up(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--max-pending-bytes=20000", "--max-tokens-cap=100000"])
    for state in suite.states.values():
        state.state.max_context_tokens = 200_000
    await suite.until(
        lambda: all(
            w.state.max_context_tokens == 200_000 for p in suite.router.pools for w in p.known()
        )
    )
    suite.decode.endless = True
    request = tools.make_request(max_tokens=100_000)
    # A window that does not grow, so that the stall comes soon.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    target = f"127.0.0.1:{suite.router.server.port}"
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request, timeout=30)
        await call.read()
        await suite.until(lambda: not suite.decode.live, timeout=20)
        await suite.until(lambda: suite.router.admission.running == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tools.rest_of(call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "slowly" in str(caught.value.details())
    await suite.assert_nothing_left()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may call\nred:key-1\nred:key-2\nblue:key-3\n")
    return path


async def test_api_keys(start_suite: Any, tools: Any, keys_file: Path) -> None:
    suite = await start_suite(flags=[f"--api-keys-file={keys_file}"])
    for header in (None, "key-1", "Bearer", "Bearer wrong", "Basic key-1"):
        metadata = [("authorization", header)] if header else []
        error = await error_of(suite, tools.make_request(), metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await suite.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    for key in ("key-1", "key-2", "key-3"):
        call = suite.stub.Generate(
            tools.make_request(max_tokens=2), metadata=[("authorization", f"Bearer {key}")]
        )
        assert tools.token_ids([m async for m in call]) == tools.tokens_after(PROMPT, 2)
    salts = [submit.cache_salt for submit in suite.decode.submits]
    assert salts[0] == salts[1] != salts[2]


async def test_tenants_may_share_the_cache(start_suite: Any, tools: Any, keys_file: Path) -> None:
    suite = await start_suite(
        flags=[f"--api-keys-file={keys_file}", "--share-cache-between-tenants"]
    )
    for key in ("key-1", "key-3"):
        call = suite.stub.Generate(
            tools.make_request(max_tokens=1), metadata=[("authorization", f"Bearer {key}")]
        )
        assert [m async for m in call]
    salts = {submit.cache_salt for submit in suite.decode.submits}
    assert len(salts) == 1


async def test_a_worker_of_another_model_gets_nothing(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--model-name=other", "--worker-wait-s=0.1"], wait_ready=False)
    error = await error_of(suite, tools.make_request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert suite.decode.submits == []
