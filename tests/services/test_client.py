"""`Client` and `AsyncClient` against four real services with the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest

from splitserve.client import AsyncClient, Client
from splitserve.engine.fake import expected_tokens
from splitserve.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Unauthenticated,
    Unavailable,
)
from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig
from splitserve.sampling import SamplingParams

PROMPT = list(range(1, 60))
SLOW = ("--fake-step-ms", "20")


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **others)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a suite that asks for a key."""
    logs = tmp_path_factory.mktemp("logs")
    keys = logs / "keys"
    keys.write_text("tenant:secret\n")
    flags = {"router": ("--api-keys-file", str(keys)), "prefill": SLOW, "decode": SLOW}
    config = SuiteConfig(engine="fake", flags=flags, drain_grace_s=1.0)
    with StopSignals() as signals, LocalSuite(config, signals, logs) as suite:
        suite.start(timeout_s=60)
        yield suite.target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, api_key="secret") as client:
        yield client


def test_the_whole_answer(client: Client):
    output = client.generate(PROMPT, greedy(12, logprobs=1), request_id="mine", timeout=30)
    assert output.request_id == "mine"
    assert (output.prompt, output.prompt_token_ids) == (None, PROMPT)
    [choice] = output.outputs
    assert choice.token_ids == expected_tokens(PROMPT, 12)
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert [position.chosen.token_id for position in choice.logprobs] == choice.token_ids
    assert output.usage is not None
    assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (len(PROMPT), 12)
    assert output.timings is not None
    assert 0 < output.timings.time_to_first_token_ms <= output.timings.total_ms
    assert output.seed is not None


def test_a_stream_has_every_token_once(client: Client):
    deltas = list(client.stream(PROMPT, greedy(10), timeout=30))
    assert len(deltas) > 2
    indexes, tokens = [], []
    for choice in (choice for delta in deltas for choice in delta.choices):
        indexes += range(choice.first_token_index, choice.first_token_index + len(choice.token_ids))
        tokens += choice.token_ids
    assert indexes == list(range(10))
    assert tokens == expected_tokens(PROMPT, 10)
    assert [delta.usage is not None for delta in deltas].count(True) == 1
    assert deltas[-1].usage is not None


def test_several_outputs_come_back_sorted(client: Client):
    outputs = client.generate(PROMPT, greedy(5, n=3), timeout=30).outputs
    assert [output.index for output in outputs] == [0, 1, 2]
    assert all(len(output.token_ids) == 5 for output in outputs)


def test_models(client: Client):
    [card] = client.models()
    assert (card.name, card.vocab_size, card.max_context_tokens) == ("fake", 1000, 4096)
    assert card.ready
    assert not card.has_tokenizer


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], greedy(1), "tokens"),
        ([1000], greedy(1), "tokens"),
        ([1], greedy(0), "sampling.max_tokens"),
        ([1], SamplingParams(temperature=math.nan), "sampling.temperature"),
        ([1], SamplingParams(top_p=0.0), "sampling.top_p"),
        ([1] * 4000, greedy(500), "tokens"),
        ("text", greedy(1), "text"),
        ([{"role": "user", "content": "hi"}], greedy(1), "chat"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(
    client: Client, prompt: Any, params: SamplingParams, field: str
):
    with pytest.raises(InvalidRequest) as caught:
        client.generate(prompt, params, timeout=30)
    assert any(field in violation.field for violation in caught.value.violations)


def test_other_errors_have_their_classes(client: Client, target: str):
    with pytest.raises(ModelNotFound):
        client.generate(PROMPT, greedy(1), model="other", timeout=30)
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, greedy(2000), timeout=0.5)
    with Client(target) as nobody, pytest.raises(Unauthenticated):
        nobody.models()
    with Client(target, api_key="wrong") as stranger, pytest.raises(Unauthenticated):
        stranger.generate(PROMPT, greedy(1), timeout=30)


def test_a_router_that_is_not_there_is_unavailable():
    with Client("127.0.0.1:1") as nobody, pytest.raises(Unavailable):
        nobody.generate(PROMPT, greedy(1), timeout=10)


def test_a_key_that_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match="api_key"):
        Client("127.0.0.1:1", api_key="two\nlines")


async def test_the_async_client_gives_the_same(target: str):
    async with AsyncClient(target, api_key="secret") as client:
        assert [card.name for card in await client.models()] == ["fake"]
        outputs = await asyncio.gather(
            *(client.generate([i, i + 1], greedy(6), timeout=30) for i in range(1, 9))
        )
        for index, output in enumerate(outputs, start=1):
            assert output.outputs[0].token_ids == expected_tokens([index, index + 1], 6)
        with pytest.raises(InvalidRequest):
            await client.generate([], greedy(1), timeout=30)
        with pytest.raises(DeadlineExceeded):
            await client.generate(PROMPT, greedy(2000), timeout=0.5)


async def until_idle(worker) -> None:
    async with asyncio.timeout(5):
        # Another process's state is seen by asking only.
        while (await worker.metrics())["splitserve_num_requests_running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_leaving_a_stream_early_frees_the_worker(suite):
    store = await suite.kvstore()
    prefill = await suite.prefill(store, *SLOW)
    decode = await suite.decode(store, *SLOW)
    limits = ("--skip-tokenizer-init", "--vocab-size", "1000", "--max-context-tokens", "4096")
    router = await suite.router([prefill], [decode], *limits)
    async with AsyncClient(router.address) as client:
        stream = client.stream(PROMPT, greedy(2000), timeout=60)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                if delta.choices and delta.choices[0].first_token_index >= 2:
                    break
            await decode.until_metric("splitserve_num_requests_running", lambda count: count == 1)
        await until_idle(decode)

    def leave_a_blocking_stream() -> None:
        with Client(router.address) as blocking:
            deltas = blocking.stream(PROMPT, greedy(2000), timeout=60)
            next(deltas)
            deltas.close()

    await asyncio.to_thread(leave_a_blocking_stream)
    await until_idle(decode)
