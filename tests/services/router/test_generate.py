"""Tokens, ends and routes of ordinary requests, through scripted workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from splitserve.v1 import common_pb2, inference_pb2

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


async def test_streams_the_exact_tokens(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.prefill.cached_tokens = 4
    messages = await suite.generate(max_tokens=8, request_id="mine")
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 8)
    last = messages[-1]
    assert last.choices[0].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert last.usage == inference_pb2.Usage(
        prompt_tokens=8, cached_prompt_tokens=4, completion_tokens=8
    )
    assert last.timings.total_ms >= last.timings.time_to_first_token_ms > 0
    assert last.timings.queue_ms >= 1.5
    assert last.timings.prefill_ms == 2.5
    assert not any(message.HasField("usage") for message in messages[:-1])
    assert {message.request_id for message in messages} == {"mine"}
    await suite.assert_nothing_left()


async def test_seed_is_reported_once_and_given_to_both_tiers(start_suite: Any) -> None:
    suite = await start_suite()
    messages = await suite.generate(max_tokens=4)
    seeds = [message.seed for message in messages if message.HasField("seed")]
    assert len(seeds) == 1
    assert messages[0].HasField("seed")
    assert suite.prefill.requests[0].sampling.seed == seeds[0]
    assert suite.decode.submits[0].sampling.seed == seeds[0]
    again = await suite.generate(max_tokens=1, seed=2**64 - 1)
    assert again[0].seed == 2**64 - 1


async def test_first_token_comes_before_decode_has_anything(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.decode.hold_at = 1
    call = suite.stub.Generate(tools.make_request(max_tokens=3), timeout=10)
    first = await call.read()
    assert tools.token_ids([first]) == tools.tokens_after(PROMPT, 1)
    suite.decode.release()
    rest = await tools.rest_of(call)
    assert tools.token_ids([first, *rest]) == tools.tokens_after(PROMPT, 3)


async def test_the_receipt_of_the_prefill_goes_on_to_decode(start_suite: Any) -> None:
    suite = await start_suite()
    suite.prefill.receipt = common_pb2.KvReceipt(
        pool_id=2**63, share_id=5, block_indexes=[0, 3], pages=[7, 9], digests=bytes(range(32))
    )
    await suite.generate(max_tokens=3)
    assert suite.decode.starts[-1].kv_receipt == suite.prefill.receipt
    suite.prefill.receipt = None
    await suite.generate(max_tokens=3)
    assert not suite.decode.starts[-1].HasField("kv_receipt")


async def test_metadata_does_not_wait_for_a_message(start_suite: Any, tools: Any) -> None:
    """A message that a client does not read would keep it, and with it every status."""
    suite = await start_suite()
    suite.prefill.gate.clear()
    call = suite.stub.Generate(tools.make_request(max_tokens=3), timeout=10)
    await call.initial_metadata()
    suite.prefill.gate.set()
    assert tools.token_ids(await tools.rest_of(call)) == tools.tokens_after(PROMPT, 3)


async def test_several_choices(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    messages = await suite.generate(max_tokens=5, n=3)
    for choice in range(3):
        assert tools.token_ids(messages, choice) == tools.tokens_after(PROMPT, 5, choice)
    assert messages[-1].usage.completion_tokens == 15
    await suite.assert_nothing_left()


async def test_first_token_may_end_a_choice(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.prefill.finish_reason = common_pb2.FINISH_REASON_STOP
    messages = await suite.generate(max_tokens=5, n=2)
    assert len(messages) == 1
    assert [choice.finish_reason for choice in messages[0].choices] == [
        common_pb2.FINISH_REASON_STOP,
        common_pb2.FINISH_REASON_STOP,
    ]
    assert suite.decode.starts == []
    await suite.assert_nothing_left()


async def test_lease_is_released_once_decode_has_the_kv(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.decode.hold_at = 2
    call = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await call.read()
    await suite.until(lambda: suite.store.granted > 0 and not suite.store.live)
    assert suite.decode.live
    suite.decode.release()
    assert await tools.rest_of(call)


async def test_short_prompt_is_computed_on_the_decode_worker(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--local-prefill-tokens=9"])
    granted = suite.store.granted
    messages = await suite.generate(max_tokens=6)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 6)
    assert suite.prefill.requests == []
    assert not suite.decode.submits[0].HasField("lease")
    assert suite.store.granted == granted
    await suite.assert_nothing_left()


async def test_prompt_cached_on_the_decode_worker_is_not_prefilled(
    start_suite: Any, tools: Any
) -> None:
    suite = await start_suite(decodes=2, flags=["--local-prefill-tokens=5"])
    # One block of four tokens is uncached there: 8 - 4 < 5.
    suite.store.holders = {"decode-1": 1}
    messages = await suite.generate(max_tokens=3)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 3)
    assert suite.prefill.requests == []
    assert suite.decodes[0].submits == []
    assert not suite.decodes[1].submits[0].HasField("lease")
    await suite.assert_nothing_left()


BUSY = {"queued_tokens": 500, "prefill_tokens_per_s": 1000.0}


@pytest.mark.parametrize(
    ("decode", "n", "route"),
    [
        ({"prefill_tokens_per_s": 100.0}, 1, "overflow"),  # there in 508 ms, here in 80
        ({"prefill_tokens_per_s": 100.0, "queued_tokens": 60}, 1, "split"),  # here in 680
        ({"prefill_tokens_per_s": 100.0}, 2, "split"),
    ],
)
async def test_an_overload_of_the_prefill_tier_is_shared(
    start_suite: Any, decode: dict[str, Any], n: int, route: str
) -> None:
    suite = await start_suite()
    await tell(suite, BUSY, decode)
    await suite.generate(max_tokens=3, n=n)
    assert bool(suite.prefill.requests) == (route == "split")
    assert suite.decode.submits[0].HasField("lease") == (route == "split")
    counted = suite.router.metrics.registry.get_sample_value(
        "splitserve_router_plans_total", {"route": route}
    )
    assert counted >= 1
    await suite.assert_nothing_left()


async def test_a_prompt_stays_where_its_prefix_is(start_suite: Any) -> None:
    """There it takes 500 ms, of which nothing is the prompt's; here 502."""
    suite = await start_suite()
    await tell(suite, BUSY, {"prefill_tokens_per_s": 1000.0, "queued_tokens": 494})
    suite.store.holders = {"prefill-0": 2}
    await suite.generate(max_tokens=3)
    assert len(suite.prefill.requests) == 1
    suite.store.holders = {}
    await suite.generate(max_tokens=3)
    assert len(suite.prefill.requests) == 1
    await suite.assert_nothing_left()


async def test_cached_tokens_do_not_count_as_work(start_suite: Any) -> None:
    suite = await start_suite()
    (worker,) = suite.router.pools[0].known()
    suite.prefill.gate.clear()
    suite.store.holders = {"prefill-0": 1}
    call = asyncio.ensure_future(suite.generate(max_tokens=3))
    await suite.until(lambda: bool(suite.prefill.requests))
    assert (worker.own_requests, worker.own_tokens) == (1, len(PROMPT) - 4)
    suite.prefill.gate.set()
    await call
    await suite.assert_nothing_left()


async def test_a_prompt_that_is_computed_counts_on_the_prefill_worker_no_more(
    start_suite: Any,
) -> None:
    suite = await start_suite()
    (worker,) = suite.router.pools[0].known()
    suite.decode.hold_at = 1
    call = asyncio.ensure_future(suite.generate(max_tokens=3))
    await suite.until(lambda: bool(suite.decode.starts))
    await suite.until(lambda: (worker.own_requests, worker.own_tokens) == (0, 0))
    assert not call.done()
    suite.decode.release()
    await call
    await suite.assert_nothing_left()


async def tell(suite: Any, prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    """Have the workers report these, and the router hear of them."""
    states = suite.states[suite.prefill.address], suite.states[suite.decode.address]
    for pool, scripted, fields in zip(suite.router.pools, states, (prefill, decode), strict=True):
        for name, value in fields.items():
            setattr(scripted.state, name, value)
        await suite.until(
            lambda pool=pool, scripted=scripted: (
                [worker.state for worker in pool.known()] == [scripted.state]
            )
        )


async def test_tokens_count_on_the_worker_until_they_are_computed(start_suite: Any) -> None:
    suite = await start_suite(flags=["--local-prefill-tokens=9"])
    (worker,) = suite.router.pools[1].known()
    suite.decode.hold_at = 0
    call = asyncio.ensure_future(suite.generate(max_tokens=3))
    await suite.until(lambda: worker.own_tokens == len(PROMPT))
    suite.decode.hold_at = 1
    suite.decode.wake.set()
    await suite.until(lambda: worker.own_tokens == 0)
    assert not call.done()
    suite.decode.release()
    await call
    await suite.assert_nothing_left()


async def test_prefill_goes_where_the_prefix_is(start_suite: Any) -> None:
    suite = await start_suite(prefills=3)
    suite.store.holders = {"prefill-2": 2, "prefill-0": 1}
    await suite.generate(max_tokens=2)
    assert [len(prefill.requests) for prefill in suite.prefills] == [0, 0, 1]


async def test_both_tiers_get_the_same_request(start_suite: Any) -> None:
    suite = await start_suite()
    await suite.generate(max_tokens=2, temperature=0.5, top_k=7, stop_token_ids=[5], logprobs=2)
    prefill, decode = suite.prefill.requests[0], suite.decode.submits[0]
    assert prefill.sampling == decode.sampling
    assert (prefill.sampling.top_k, list(prefill.sampling.stop_token_ids)) == (7, [5])
    assert prefill.lease == decode.lease
    assert prefill.cache_salt == decode.cache_salt
    assert prefill.request_id == decode.request_id
    assert decode.timeout_ms > 0


async def test_same_client_name_twice_at_once(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    answers = await asyncio.gather(
        *(suite.generate(max_tokens=20, request_id="same") for _ in range(4))
    )
    for messages in answers:
        assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 20)
    assert len({submit.request_id for submit in suite.decode.submits}) == 4


async def test_list_models(start_suite: Any) -> None:
    suite = await start_suite()
    response = await suite.stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
    assert list(response.models) == [
        inference_pb2.Model(
            name="toy",
            max_context_tokens=512,
            vocab_size=1000,
            has_tokenizer=False,
            has_chat_template=False,
            ready=True,
        )
    ]


@pytest.mark.parametrize("policy", ["round-robin", "least-loaded", "prefix-load"])
async def test_policies_spread_requests(start_suite: Any, tools: Any, policy: str) -> None:
    suite = await start_suite(decodes=2, flags=[f"--policy={policy}"])
    for decode in suite.decodes:
        decode.hold_at = 1
    calls = [suite.stub.Generate(tools.make_request(max_tokens=2), timeout=10) for _ in range(4)]
    for call in calls:
        await call.read()
    assert sum(len(decode.submits) for decode in suite.decodes) == 4
    assert all(len(decode.submits) >= 1 for decode in suite.decodes)
    for decode in suite.decodes:
        decode.release()
    for call in calls:
        assert (await tools.rest_of(call))[-1].HasField("usage")
    await suite.assert_nothing_left()


async def test_round_robin_over_prefill_workers(start_suite: Any) -> None:
    suite = await start_suite(prefills=2, flags=["--policy=round-robin"])
    for _ in range(6):
        await suite.generate(max_tokens=1)
    counts = [len(prefill.requests) for prefill in suite.prefills]
    # A canary may take a turn in between.
    assert min(counts) >= 2


async def test_max_tokens_defaults_to_what_fits(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--default-max-tokens=1000"])
    request = tools.make_request(prompt=[1] * 500)
    request.sampling.ClearField("max_tokens")
    messages = [message async for message in suite.stub.Generate(request, timeout=10)]
    assert messages[-1].usage.completion_tokens == 12


async def test_a_thousand_streams_at_once(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--store-timeout-s=30"])
    suite.decode.hold_at = 1

    async def one(number: int) -> list[Any]:
        request = tools.make_request(prompt=[*PROMPT[:-1], number % 900], max_tokens=3)
        return [message async for message in suite.stub.Generate(request, timeout=60)]

    tasks = [asyncio.create_task(one(number)) for number in range(1000)]
    await suite.until(lambda: len(suite.decode.starts) == 1000, timeout=60)
    assert suite.router.admission.running == 1000
    suite.decode.release()
    for number, messages in enumerate(await asyncio.gather(*tasks)):
        prompt = [*PROMPT[:-1], number % 900]
        assert tools.token_ids(messages) == tools.tokens_after(prompt, 3)
    await suite.assert_nothing_left()
