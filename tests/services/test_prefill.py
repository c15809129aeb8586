"""The prefill service by itself: answers, refusals, ends. No store runs."""

from __future__ import annotations

import asyncio
import sys

import grpc
import pytest

from splitserve.engine.fake import expected_tokens
from splitserve.errors import InvalidRequest, Overloaded
from splitserve.rpc.status import error_from_rpc
from splitserve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

NO_STORE = "127.0.0.1:1"
PROMPT = [5, 9, 2, 7]


def request_of(prompt=PROMPT, *, request_id="a", **sampling) -> prefill_pb2.PrefillRequest:
    fields = {"temperature": 0.0, "max_tokens": 8, "seed": 7, "ignore_eos": True, **sampling}
    return prefill_pb2.PrefillRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=common_pb2.SamplingParams(**fields),
    )


@pytest.fixture
async def prefill(suite, request):
    """A running worker, with the flags that the test is parametrised with."""
    return await suite.prefill(NO_STORE, *getattr(request, "param", ()))


@pytest.fixture
async def stub(prefill):
    async with prefill.channel() as channel:
        yield prefill_pb2_grpc.PrefillServiceStub(channel)


async def test_first_tokens_of_every_choice(prefill, stub, pages_free):
    answer = await stub.Prefill(request_of(logprobs=2), timeout=10)
    [first] = answer.first_tokens
    [expected] = expected_tokens(PROMPT, 1)
    assert first.token.id == expected
    assert first.token.logprobs.chosen.logprob == -(expected % 8) / 8
    assert len(first.token.logprobs.top) == 2
    assert first.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED
    assert answer.queue_ms >= 0
    assert answer.compute_ms > 0

    answer = await stub.Prefill(request_of(n=3, temperature=1.0), timeout=10)
    total = sum((p + 1) * t for p, t in enumerate(PROMPT))
    assert [f.token.id for f in answer.first_tokens] == [
        (total + 7 + 7 * choice) % 1000 for choice in range(3)
    ]
    answer = await stub.Prefill(request_of(max_tokens=1), timeout=10)
    assert answer.first_tokens[0].finish_reason == common_pb2.FINISH_REASON_LENGTH
    await pages_free(prefill)


async def test_its_own_pool_is_reused(prefill, stub, pages_free):
    prompt = list(range(1, 101))
    assert (await stub.Prefill(request_of(prompt), timeout=10)).cached_tokens == 0
    again = await stub.Prefill(request_of(prompt), timeout=10)
    assert again.cached_tokens == 96
    assert again.first_tokens[0].token.id == expected_tokens(prompt, 1)[0]
    salted = request_of(prompt)
    salted.cache_salt = b"another tenant"
    assert (await stub.Prefill(salted, timeout=10)).cached_tokens == 0
    metrics = await prefill.metrics()
    assert metrics["splitserve_prefix_cache_hits_total"] == 96
    assert metrics["splitserve_prefix_cache_queries_total"] == 300
    await pages_free(prefill)


@pytest.mark.parametrize("prefill", [("--skip-prefix-cache",)], indirect=True)
async def test_the_prefix_cache_can_be_skipped(prefill, stub):
    prompt = list(range(1, 101))
    for _ in range(2):
        assert (await stub.Prefill(request_of(prompt), timeout=10)).cached_tokens == 0


async def test_bad_requests_name_their_fields(prefill, stub, pages_free):
    unseeded = request_of()
    unseeded.sampling.ClearField("seed")
    bad = [
        (request_of([]), "prompt_token_ids"),
        (request_of([1000]), "prompt_token_ids"),
        (request_of([1] * 4096), "prompt_token_ids"),
        (request_of(top_p=float("inf")), "sampling.top_p"),
        (request_of(min_p=-1.0), "sampling.min_p"),
        (request_of(n=1000), "sampling.n"),
        (request_of(max_tokens=-1), "sampling.max_tokens"),
        (unseeded, "sampling.seed"),
    ]
    for request, field in bad:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Prefill(request, timeout=10)
        error = error_from_rpc(refused.value)
        assert isinstance(error, InvalidRequest)
        assert field in [violation.field for violation in error.violations]
    answer = await stub.Prefill(request_of(), timeout=10)
    assert answer.first_tokens[0].token.id == expected_tokens(PROMPT, 1)[0]
    await pages_free(prefill)


@pytest.mark.parametrize("prefill", [("--max-queue", "2", "--fake-step-ms", "300")], indirect=True)
async def test_a_full_queue_says_when_to_come_back(prefill, stub, pages_free):
    calls = [stub.Prefill(request_of(request_id=f"r{i}"), timeout=20) for i in range(4)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    answered = [o for o in outcomes if isinstance(o, prefill_pb2.PrefillResponse)]
    errors = [error_from_rpc(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
    assert len(answered) == 2
    assert [type(error) for error in errors] == [Overloaded, Overloaded]
    assert all(error.retry_after_s for error in errors)
    await pages_free(prefill)


@pytest.mark.parametrize(
    "prefill", [("--fake-step-ms", "200", "--max-step-tokens", "80")], indirect=True
)
async def test_drain_answers_what_it_has(suite, prefill, stub):
    prompt = list(range(1, 401))  # five steps, so that it still runs when the next one comes
    running = asyncio.ensure_future(stub.Prefill(request_of(prompt), timeout=20))
    await prefill.until_metric("splitserve_num_requests_running", lambda count: count > 0)
    stopping = asyncio.create_task(suite.stop(prefill))
    await prefill.wait_health(serving=False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Prefill(request_of(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await running).first_tokens[0].token.id == expected_tokens(prompt, 1)[0]
    assert await stopping == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--engine", "torch", "--model", "/no/such/checkpoint"), "/no/such/checkpoint"),
        (("--engine", "torch"), "--model"),
        (("--engine", "fake", "--max-batch", "64", "--max-step-tokens", "64"), "--max-step-tokens"),
        (("--engine", "fake", "--pool-bytes", "none"), "--pool-bytes"),
        (("--engine", "fake", "--pool-bytes", str(10**15)), "pool_bytes"),
    ],
)
async def test_what_cannot_start_says_why_in_one_line(flags, named):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.prefill", "--port", "0", "--metrics-port", "0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert stdout == b""
    [line] = stderr.decode().splitlines()
    assert named in line
