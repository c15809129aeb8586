"""Workers and stores that fail, clients that leave: one typed end, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest

from splitserve.errors import InvalidRequest, LeaseEnded, Overloaded, Unavailable
from splitserve.v1 import decode_pb2

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


async def status_of(call: Any) -> grpc.StatusCode:
    """How a call ends that must not end well."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    pytest.fail("the call ended well")


@pytest.mark.parametrize(
    "error", [Unavailable("draining"), Overloaded("full", 1.0), LeaseEnded("gone")]
)
async def test_prefill_is_tried_again_elsewhere(
    start_suite: Any, tools: Any, error: Exception
) -> None:
    suite = await start_suite(prefills=2)
    suite.prefills[0].fail = error
    suite.store.holders = {"prefill-0": 2}
    messages = await suite.generate(max_tokens=5)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
    assert [len(prefill.requests) for prefill in suite.prefills] == [1, 1]
    await suite.assert_nothing_left()


async def test_prefill_refusal_of_the_request_is_final(start_suite: Any) -> None:
    suite = await start_suite(prefills=2)
    for prefill in suite.prefills:
        prefill.fail = InvalidRequest.single("prompt", "no good")
    call = suite.stub.Generate(make(suite), timeout=5)
    assert await status_of(call) is grpc.StatusCode.INVALID_ARGUMENT
    assert sum(len(prefill.requests) for prefill in suite.prefills) == 1
    await suite.assert_nothing_left()


async def test_prefill_worker_dies_in_mid_prompt(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.prefill.gate.clear()
    task = asyncio.create_task(suite.generate(max_tokens=5))
    await suite.until(lambda: len(suite.prefill.requests) == 1)
    await suite.kill(suite.prefill.address)
    # No prefill worker is left: the decode worker computes the prompt.
    assert tools.token_ids(await task) == tools.tokens_after(PROMPT, 5)
    assert not suite.decode.submits[-1].HasField("lease")
    await suite.assert_nothing_left()


async def test_prefill_worker_dies_with_blocks_unwritten(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(prefills=2)
    suite.store.holders = {"prefill-0": 2}
    suite.decode.hold_at = 1
    call = suite.stub.Generate(tools.make_request(max_tokens=4), timeout=10)
    await call.read()
    await suite.until(lambda: len(suite.store.live) == 1)
    await suite.kill(suite.prefills[0].address)
    # The decode worker need not wait for what nobody writes any more.
    await suite.until(lambda: not suite.store.live)
    assert suite.decode.live
    suite.decode.release()
    assert len(await tools.rest_of(call)) > 0
    await suite.assert_nothing_left()


async def test_decode_worker_dies_in_mid_stream(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2)
    for decode in suite.decodes:
        decode.hold_at = 4
    call = suite.stub.Generate(tools.make_request(max_tokens=10, n=2), timeout=10)
    messages = []
    while len(tools.token_ids(messages, 0)) < 4 or len(tools.token_ids(messages, 1)) < 4:
        messages.append(await call.read())
    first, second = sorted(suite.decodes, key=lambda decode: -len(decode.submits))
    second.release()
    await suite.kill(first.address)
    messages += await tools.rest_of(call)
    for choice in range(2):
        assert tools.token_ids(messages, choice) == tools.tokens_after(PROMPT, 10, choice)
    resume = second.submits[0].resume
    assert [list(choice.token_ids) for choice in resume] == [
        tools.tokens_after(PROMPT, 4, choice) for choice in range(2)
    ]
    assert len(suite.prefill.requests) == 1
    second.live.pop("x", None)
    first.live.clear()
    await suite.assert_nothing_left()


async def test_decode_worker_dies_before_the_first_token(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2)
    suite.prefill.gate.clear()
    task = asyncio.create_task(suite.generate(max_tokens=5))
    await suite.until(lambda: len(suite.prefill.requests) == 1)
    first, second = sorted(suite.decodes, key=lambda decode: -len(decode.submits))
    suite.prefill.gate.set()
    suite.prefill.gate.clear()
    await suite.kill(first.address)
    await suite.until(lambda: len(suite.prefill.requests) == 2 or bool(second.submits))
    suite.prefill.gate.set()
    assert tools.token_ids(await task) == tools.tokens_after(PROMPT, 5)
    await suite.assert_nothing_left()


async def test_the_only_decode_worker_comes_back(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    suite.decode.hold_at = 3
    call = suite.stub.Generate(tools.make_request(max_tokens=8), timeout=10)
    messages = []
    while len(tools.token_ids(messages)) < 3:
        messages.append(await call.read())
    await suite.kill(suite.decode.address)
    suite.decode.release()
    await suite.bring_back(suite.decode.address)
    messages += await tools.rest_of(call)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 8)
    assert list(suite.decode.submits[-1].resume[0].token_ids) == tools.tokens_after(PROMPT, 3)
    await suite.assert_nothing_left()


def split_works(suite: Any) -> bool:
    """As the gauge tells."""
    value: float = suite.router.metrics.registry.get_sample_value("splitserve_router_split_working")
    return value == 1


async def test_readiness_follows_the_decode_tier(start_suite: Any) -> None:
    suite = await start_suite(flags=["--canary-interval-s=0.05", "--worker-wait-s=0.05"])
    assert split_works(suite)
    await suite.kill(suite.decode.address)
    await suite.until(lambda: not suite.router.readiness.ready)
    assert not split_works(suite)
    await suite.bring_back(suite.decode.address)
    await suite.until(lambda: suite.router.readiness.ready and split_works(suite))
    await suite.assert_nothing_left()


@pytest.mark.parametrize("tier", ["prefill", "store"])
async def test_it_stays_ready_without_the_split(start_suite: Any, tools: Any, tier: str) -> None:
    suite = await start_suite(flags=["--canary-interval-s=0.05"])
    told: list[bool] = []
    suite.router.readiness._set_ready = told.append
    address = getattr(suite, tier).address
    await suite.kill(address)
    await suite.until(lambda: not split_works(suite))
    assert tools.token_ids(await suite.generate(max_tokens=5)) == tools.tokens_after(PROMPT, 5)
    await suite.bring_back(address)
    await suite.until(lambda: split_works(suite))
    assert told == []
    assert suite.router.readiness.ready
    await suite.assert_nothing_left()


async def test_a_router_that_starts_without_prefill_serves_after_a_while(
    start_suite: Any, tools: Any
) -> None:
    suite = await start_suite(prefills=0, flags=["--split-wait-s=0.2", "--prefill=127.0.0.1:1"])
    assert suite.router.readiness.ready
    assert not split_works(suite)
    assert tools.token_ids(await suite.generate(max_tokens=5)) == tools.tokens_after(PROMPT, 5)


async def test_a_dead_store_leaves_the_other_stores_prefill_workers(
    start_suite: Any, tools: Any
) -> None:
    suite = await start_suite(prefills=4)
    for number, prefill in enumerate(suite.prefills):
        state = suite.states[prefill.address].state
        if number == 0:
            state.store_address = "127.0.0.1:1"
        else:
            state.queued_tokens = 1000
    known = suite.router.pools[0].known
    await suite.until(
        lambda: (
            sorted(w.queued_tokens for w in known()) == [0, 1000, 1000, 1000]
            and sum(w.store_address == "127.0.0.1:1" for w in known()) == 1
        )
    )
    for _ in range(3):
        messages = await suite.generate(max_tokens=5)
        assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
    assert suite.prefills[0].requests == []
    assert sum(len(prefill.requests) for prefill in suite.prefills) == 3
    assert all(submit.HasField("lease") for submit in suite.decode.submits)
    await suite.assert_nothing_left()


async def update_model(suite: Any, decode: Any) -> None:
    """The worker now has another model under the same name."""
    suite.states[decode.address].state.kv_layout.model_fingerprint = b"g" * 32
    known = suite.router.pools[1].known
    await suite.until(lambda: any(w.model_fingerprint == b"g" * 32 for w in known()))


async def test_output_is_not_gone_on_with_by_another_model(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2, flags=["--worker-wait-s=0.2"])
    first, other = suite.decodes
    await update_model(suite, other)
    first.hold_at = 3
    call = suite.stub.Generate(tools.make_request(max_tokens=8), timeout=10)
    messages = []
    while len(tools.token_ids(messages)) < 3:
        messages.append(await call.read())
    await suite.kill(first.address)
    assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
    assert other.submits == []
    first.live.clear()
    await suite.assert_nothing_left()


async def test_resume_waits_for_a_worker_of_the_same_model(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2)
    first, other = suite.decodes
    await update_model(suite, other)
    first.hold_at = 3
    call = suite.stub.Generate(tools.make_request(max_tokens=8), timeout=10)
    messages = []
    while len(tools.token_ids(messages)) < 3:
        messages.append(await call.read())
    await suite.kill(first.address)
    first.release()
    await suite.bring_back(first.address)
    messages += await tools.rest_of(call)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 8)
    assert other.submits == []
    await suite.assert_nothing_left()


async def test_a_draining_worker_gets_nothing_new(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2)
    draining = suite.decodes[0]
    suite.states[draining.address].state.ready = False
    pool = suite.router.pools[1]
    await suite.until(lambda: len(pool.ready()) == 1)
    for _ in range(3):
        assert await suite.generate(max_tokens=2)
    assert draining.submits == []
    assert len(suite.decodes[1].submits) == 3


async def test_workers_of_different_layouts_are_not_paired(start_suite: Any) -> None:
    suite = await start_suite(decodes=2)
    other = suite.decodes[0]
    suite.states[other.address].state.kv_layout.block_bytes = 128
    known = suite.router.pools[1].known
    await suite.until(lambda: any(w.state.kv_layout.block_bytes == 128 for w in known()))
    for _ in range(3):
        assert await suite.generate(max_tokens=2)
    assert other.submits == []


async def test_no_decode_worker_in_time_is_unavailable(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(flags=["--worker-wait-s=0.2"])
    suite.decode.hold_at = 2
    call = suite.stub.Generate(tools.make_request(max_tokens=5), timeout=5)
    await call.read()
    await suite.kill(suite.decode.address)
    assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
    suite.decode.live.clear()
    await suite.assert_nothing_left()


async def test_no_worker_at_all(start_suite: Any) -> None:
    suite = await start_suite(flags=["--worker-wait-s=0.1"])
    await suite.kill(suite.prefill.address)
    await suite.kill(suite.decode.address)
    call = suite.stub.Generate(make(suite), timeout=5)
    assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
    await suite.assert_nothing_left()


async def test_store_dies(start_suite: Any, tools: Any) -> None:
    suite = await start_suite()
    await suite.kill(suite.store.address)
    messages = await suite.generate(max_tokens=5)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
    assert not suite.decode.submits[-1].HasField("lease")
    await suite.assert_nothing_left()


@pytest.mark.parametrize(
    ("code", "retried"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        (grpc.StatusCode.NOT_FOUND, True),
        (grpc.StatusCode.INTERNAL, False),
    ],
)
async def test_sequence_error(
    start_suite: Any, tools: Any, code: grpc.StatusCode, retried: bool
) -> None:
    suite = await start_suite(decodes=2)
    suite.store.holders = {"decode-0": 2}
    suite.decodes[0].error = decode_pb2.SequenceError(code=code.value[0], message="broken")
    if retried:
        messages = await suite.generate(max_tokens=5)
        assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
        # The first token was out by then, so the second worker goes on from it.
        assert len(suite.decodes[1].submits[0].resume) == 1
    else:
        assert await status_of(suite.stub.Generate(make(suite), timeout=5)) is code
        assert suite.decodes[1].submits == []
    await suite.assert_nothing_left()


async def test_a_gap_in_the_tokens_never_reaches_the_client(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2)
    suite.store.holders = {"decode-0": 2}
    suite.decodes[0].skip_index_at = 3
    messages = await suite.generate(max_tokens=6)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 6)
    assert list(suite.decodes[1].submits[0].resume[0].token_ids) == tools.tokens_after(PROMPT, 3)
    await suite.assert_nothing_left()


async def test_lists_of_tokens_that_do_not_match_break_the_stream(
    start_suite: Any, tools: Any, caplog: Any
) -> None:
    """Whose tokens they are cannot be told: every request there goes on elsewhere."""
    suite = await start_suite(decodes=2)
    suite.store.holders = {"decode-0": 2}
    suite.decodes[0].uneven_at = 3
    messages = await suite.generate(max_tokens=6)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 6)
    assert list(suite.decodes[1].submits[0].resume[0].token_ids) == tools.tokens_after(PROMPT, 3)
    assert "reading from decode worker" in caplog.text
    await suite.assert_nothing_left()


async def test_attempts_are_bounded(start_suite: Any) -> None:
    suite = await start_suite(flags=["--max-attempts=3"])
    suite.decode.error = decode_pb2.SequenceError(
        code=grpc.StatusCode.UNAVAILABLE.value[0], message="again"
    )
    call = suite.stub.Generate(make(suite), timeout=5)
    assert await status_of(call) is grpc.StatusCode.UNAVAILABLE
    assert len(suite.decode.submits) == 3
    await suite.assert_nothing_left()


async def test_deadline_in_prefill(start_suite: Any) -> None:
    suite = await start_suite()
    suite.prefill.gate.clear()
    call = suite.stub.Generate(make(suite), timeout=0.3)
    assert await status_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.until(lambda: suite.prefill.cancelled == 1)
    await suite.assert_nothing_left()


async def test_deadline_in_decode(start_suite: Any) -> None:
    suite = await start_suite()
    suite.decode.hold_at = 3
    call = suite.stub.Generate(make(suite), timeout=0.4)
    assert await status_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.assert_nothing_left()


async def test_server_side_deadline(start_suite: Any) -> None:
    suite = await start_suite(flags=["--default-deadline-s=0.3"])
    suite.decode.hold_at = 3
    call = suite.stub.Generate(make(suite))
    assert await status_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.assert_nothing_left()


async def test_expired_deadline(start_suite: Any) -> None:
    suite = await start_suite()
    call = suite.stub.Generate(make(suite), timeout=1e-6)
    assert await status_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.assert_nothing_left()


async def test_cancel_in_prefill(start_suite: Any) -> None:
    suite = await start_suite()
    suite.prefill.gate.clear()
    call = suite.stub.Generate(make(suite), timeout=10)
    reading = asyncio.ensure_future(call.read())
    await suite.until(lambda: len(suite.prefill.requests) == 1 and len(suite.decode.submits) == 1)
    call.cancel()
    await asyncio.wait({reading})
    await suite.until(lambda: suite.prefill.cancelled == 1)
    await suite.until(lambda: len(suite.decode.cancels) == 1)
    await suite.assert_nothing_left()


async def test_random_cancels_leave_no_task(start_suite: Any, tools: Any) -> None:
    suite = await start_suite(decodes=2, flags=["--policy=round-robin"])
    for decode in suite.decodes:
        decode.step_s = 0.001
        # Opens the worker's stream, which stays.
        await suite.generate(max_tokens=2)
    await suite.assert_nothing_left()
    before = len(asyncio.all_tasks())
    dice = random.Random(7)

    async def one() -> None:
        call = suite.stub.Generate(tools.make_request(max_tokens=30), timeout=20)
        for _ in range(dice.randrange(12)):
            if await call.read() is grpc.aio.EOF:
                return
        call.cancel()

    await asyncio.gather(*(one() for _ in range(200)))
    await suite.assert_nothing_left()
    await suite.until(lambda: len(asyncio.all_tasks()) <= before)
    messages = await suite.generate(max_tokens=5)
    assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)


def make(suite: Any) -> Any:
    return suite.make_request(max_tokens=8)
