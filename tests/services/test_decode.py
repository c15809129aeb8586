"""The decode service by itself: its stream, its ends, its limits. No store runs."""

from __future__ import annotations

import asyncio

import grpc

from splitserve.engine.fake import expected_tokens
from splitserve.v1 import common_pb2, decode_pb2

NO_STORE = "127.0.0.1:1"
SLOW = ("--fake-step-ms", "10")
PROMPT = [5, 9, 2, 7]


def code_of(choice) -> grpc.StatusCode:
    assert choice.error is not None
    return {code.value[0]: code for code in grpc.StatusCode}[choice.error.code]


async def test_local_prefill_streams_exact_tokens(suite, attach, worker_state, pages_free):
    decode = await suite.decode(NO_STORE)
    router = attach(decode)
    for index in range(20):
        await router.submit(f"r{index}", [*PROMPT, index], max_tokens=30)
    for index in range(20):
        choice = await router.result(f"r{index}")
        assert choice.first_index == 0
        assert choice.tokens == expected_tokens([*PROMPT, index], 30)
        assert choice.finish_reason == common_pb2.FINISH_REASON_LENGTH
    await pages_free(decode)
    state = await worker_state(decode)
    assert (state.ready, state.model, state.store_address) == (True, "fake", "")
    assert (state.total_pages, state.max_context_tokens) == (256, 4096)
    assert state.kv_layout.block_tokens == 16
    metrics = await decode.metrics()
    assert metrics["splitserve_generation_tokens_total"] == 600
    assert metrics["splitserve_request_success_total"] == 20


async def test_one_message_a_step(suite, attach):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    for index in range(10):
        await router.submit(f"r{index}", [*PROMPT, index], max_tokens=20)
    for index in range(10):
        await router.result(f"r{index}")
    # Ten requests of twenty tokens in far fewer messages than the 200 tokens.
    assert router.num_messages <= 45


async def test_tokens_are_told_in_short_under_the_routers_numbers(suite, attach):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    await router.submit("a", PROMPT, max_tokens=20, n=2, temperature=1.0, first_tag=2**63)
    await router.submit("b", PROMPT, max_tokens=20, first_tag=7)
    await router.submit("c", PROMPT, max_tokens=20)
    await router.submit("d", PROMPT, max_tokens=20, logprobs=1, first_tag=11)
    choices = [await router.result(*name) for name in (("a", 0), ("a", 1), ("b", 0), ("c", 0))]
    assert [len(choice.tokens) for choice in choices] == [20] * 4
    assert choices[2].tokens == choices[3].tokens == expected_tokens(PROMPT, 20)
    assert choices[0].tokens != choices[1].tokens
    await router.result("d")
    # All but the first and last of "a" and "b", unless the reader was late and news were merged.
    assert 30 <= router.num_in_short <= 3 * 18


LEASE = common_pb2.LeaseRef(lease_id="gone", epoch=1, store_address=NO_STORE)
REFUSED = [
    ({"prompt": []}, "prompt_token_ids"),
    ({"prompt": [1000]}, "prompt_token_ids"),
    ({"prompt": [1] * 4090, "max_tokens": 8}, "prompt_token_ids"),
    ({"max_tokens": 0}, "sampling.max_tokens"),
    ({"seed": None}, "sampling.seed"),
    ({"n": 2, "first_tag": 2**64 - 1}, "first_tag"),
    ({"temperature": float("nan")}, "sampling.temperature"),
    ({"n": 0}, "sampling.n"),
    ({"n": 10_000}, "sampling.n"),
    ({"request_id": "x" * 300}, "request_id"),
    ({"resume": [decode_pb2.ChoiceProgress(index=1)]}, "resume"),
    ({"resume": [decode_pb2.ChoiceProgress(token_ids=[1000])]}, "resume"),
    ({"resume": [decode_pb2.ChoiceProgress(finished=True)]}, "resume"),
    ({"resume": [decode_pb2.ChoiceProgress(token_ids=[1])], "lease": LEASE}, "resume"),
]


async def test_bad_submits_end_themselves_only(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    await router.submit("good", PROMPT, max_tokens=100)
    for index, (fields, field) in enumerate(REFUSED):
        submit = {"request_id": f"bad-{index}", "prompt": PROMPT, **fields}
        await router.submit(**submit)
        refused = await router.result(submit["request_id"])
        assert code_of(refused) is grpc.StatusCode.INVALID_ARGUMENT
        assert field in refused.error.message, fields
    await router.call.write(decode_pb2.AttachRequest())  # no command at all
    assert (await router.result("good")).tokens == expected_tokens(PROMPT, 100)
    await pages_free(decode)


async def test_starts_that_do_not_fit(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE)
    router = attach(decode)
    await router.start("unknown", [1])
    assert code_of(await router.result("unknown")) is grpc.StatusCode.NOT_FOUND
    for name, firsts in (("few", []), ("many", [1, 2]), ("range", [1000])):
        await router.submit(name, PROMPT, lease=LEASE)
        await router.start(name, firsts)
        assert code_of(await router.result(name)) is grpc.StatusCode.INVALID_ARGUMENT
    await router.submit("twice", PROMPT, lease=LEASE, max_tokens=4000)
    await router.start("twice", [3])
    await router.start("twice", [3])
    assert code_of(await router.result("twice")) is grpc.StatusCode.INVALID_ARGUMENT
    await router.submit("ends-at-once", PROMPT, lease=LEASE, max_tokens=1)
    await router.start("ends-at-once", [3])
    ended = await router.result("ends-at-once")
    assert (ended.tokens, ended.finish_reason) == ([], common_pb2.FINISH_REASON_LENGTH)
    await pages_free(decode)


async def test_a_name_used_twice_ends_both(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, *SLOW)
    router, other = attach(decode), attach(decode)
    await router.submit("same", PROMPT, max_tokens=1000)
    await other.submit("same", PROMPT, max_tokens=20)  # another router's names are its own
    await router.submit("same", PROMPT, max_tokens=1000)
    assert code_of(await router.result("same")) is grpc.StatusCode.INVALID_ARGUMENT
    assert (await other.result("same")).tokens == expected_tokens(PROMPT, 20)
    await pages_free(decode)


async def test_cancel_one_choice_then_all(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    await router.submit("a", PROMPT, n=2, max_tokens=1000)
    await router.until(lambda: len(router.choice("a", 1).tokens) > 3)
    await router.cancel("a", 0)
    await router.cancel("a", 0)
    await router.cancel("unknown")
    stopped = len(router.choice("a", 0).tokens)
    going = len(router.choice("a", 1).tokens)
    await router.until(lambda: len(router.choice("a", 1).tokens) > going + 10)
    assert len(router.choice("a", 0).tokens) <= stopped + 3
    await router.cancel("a")
    await pages_free(decode)
    assert not router.choice("a", 1).ended


async def test_the_end_of_a_stream_frees_all(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, *SLOW)
    router, other = attach(decode), attach(decode)
    for index in range(5):
        await router.submit(f"r{index}", [*PROMPT, index], max_tokens=2000)
    await other.submit("stays", PROMPT, max_tokens=60)
    await router.until(lambda: bool(router.choice("r4").tokens))
    await router.close()
    assert (await other.result("stays")).tokens == expected_tokens(PROMPT, 60)
    await pages_free(decode)


async def test_a_router_that_sends_no_more_gets_what_it_asked_for(suite, attach):
    decode = await suite.decode(NO_STORE)
    router = attach(decode)
    await router.submit("a", PROMPT, max_tokens=50)
    await router.call.done_writing()
    assert (await router.result("a")).tokens == expected_tokens(PROMPT, 50)
    await router.until(lambda: router.status is not None)
    assert router.status is grpc.StatusCode.OK


async def test_the_worker_keeps_the_deadline(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    await router.submit("late", PROMPT, max_tokens=2000, timeout_ms=300)
    await router.submit("over", PROMPT, max_tokens=50, timeout_ms=1)
    assert code_of(await router.result("over")) is grpc.StatusCode.DEADLINE_EXCEEDED
    late = await router.result("late")
    assert code_of(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert late.tokens == expected_tokens(PROMPT, len(late.tokens))
    await pages_free(decode)


async def test_preemption_changes_no_token(suite, attach, pages_free):
    page_bytes = 4 * 16 * 8
    decode = await suite.decode(NO_STORE, "--pool-bytes", str(24 * page_bytes))
    router = attach(decode)
    prompts = {f"r{i}": [(11 * i + j) % 997 for j in range(30)] for i in range(8)}
    for name, prompt in prompts.items():
        await router.submit(name, prompt, max_tokens=150)
    for name, prompt in prompts.items():
        assert (await router.result(name)).tokens == expected_tokens(prompt, 150), name
    await decode.until_metric("splitserve_num_preemptions_total", lambda count: count > 0)
    await pages_free(decode)


async def test_what_can_never_fit_is_refused(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, "--pool-bytes", str(4 * 4 * 16 * 8))
    router = attach(decode)
    await router.submit("big", PROMPT, max_tokens=100)
    assert code_of(await router.result("big")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    await router.submit("fits", PROMPT, max_tokens=40)
    assert (await router.result("fits")).tokens == expected_tokens(PROMPT, 40)
    await pages_free(decode)


async def test_a_request_goes_on_where_another_worker_stopped(suite, attach):
    decode = await suite.decode(NO_STORE)
    router = attach(decode)
    whole = expected_tokens(PROMPT, 20)
    progress = [
        decode_pb2.ChoiceProgress(index=0, token_ids=whole[:12]),
        decode_pb2.ChoiceProgress(index=1, finished=True),
    ]
    await router.submit("a", PROMPT, n=2, max_tokens=20, resume=progress)
    choice = await router.result("a")
    assert (choice.first_index, choice.tokens) == (12, whole[12:])


async def test_a_slow_router_loses_its_stream_and_nobody_else(suite, attach, pages_free):
    decode = await suite.decode(NO_STORE, "--max-pending-tokens", "3000")
    slow, quick = attach(decode), attach(decode)
    slow.reading.clear()
    for index in range(40):
        await slow.submit(f"r{index}", [*PROMPT, index], max_tokens=3500, logprobs=20)
    await quick.submit("a", PROMPT, max_tokens=300)
    assert (await quick.result("a")).tokens == expected_tokens(PROMPT, 300)
    await pages_free(decode, timeout_s=60)
    slow.reading.set()
    await slow.until(lambda: slow.status is not None)
    assert slow.status is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_does_not_wait_for_a_message(suite, attach):
    """A message that a router does not read would keep it, and with it every status."""
    router = attach(await suite.decode(NO_STORE))
    async with asyncio.timeout(10):
        await router.call.initial_metadata()
    assert router.num_messages == 0


async def test_drain_finishes_what_runs(suite, attach):
    decode = await suite.decode(NO_STORE, *SLOW)
    router = attach(decode)
    await router.submit("a", PROMPT, max_tokens=100)
    await router.until(lambda: bool(router.choice("a").tokens))
    stopping = asyncio.create_task(suite.stop(decode))
    await decode.wait_health(serving=False)
    await router.submit("b", PROMPT)
    assert code_of(await router.result("b")) is grpc.StatusCode.UNAVAILABLE
    assert (await router.result("a")).tokens == expected_tokens(PROMPT, 100)
    assert await stopping == 0
    assert router.status is grpc.StatusCode.UNAVAILABLE


async def test_a_stuck_engine_is_not_ready(suite, attach):
    decode = await suite.decode(NO_STORE, "--fake-step-ms", "700", "--stuck-after-s", "0.2")
    router = attach(decode)
    assert await decode.health("liveness")
    await router.submit("a", PROMPT, max_tokens=1)
    await decode.wait_health(serving=False)
    assert (await router.result("a")).tokens == expected_tokens(PROMPT, 1)
    await decode.wait_health()
