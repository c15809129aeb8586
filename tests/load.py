"""Clients of a router, and how each of their requests ended.

    load = Load(router, clients=32, deadline_s=20)
    async with load.running():
        await load.until(lambda ends: ends.count("OK") > 100)

Every answer is checked against the sum that the fake engine computes: token indexes without a gap
or a duplicate, and each token right, also where the request failed half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from splitserve.engine.fake import expected_tokens
from splitserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from .suite import Service

VOCAB = 1000
SEED = 123
"""Greedy sums soon run into nothing but zeros; drawn ones do not."""


@dataclass
class Answer:
    """One request's end as its client saw it."""

    tokens: list[int] = field(default_factory=list)
    status: str = ""
    details: str = ""
    seconds: float = 0.0
    finished: bool = False


def request(prompt: Sequence[int], count: int) -> inference_pb2.GenerateRequest:
    """To its full length, whatever tokens are drawn."""
    return inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(ids=prompt),
        sampling=common_pb2.SamplingParams(
            max_tokens=count, temperature=1.0, seed=SEED, ignore_eos=True
        ),
    )


async def ask(
    channel: grpc.aio.Channel,
    prompt: Sequence[int],
    count: int,
    deadline_s: float,
    *,
    on_news: Callable[[], None] = lambda: None,
) -> Answer:
    """One request to its end. Never raises for a failed one."""
    answer, began = Answer(), time.monotonic()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(request(prompt, count), timeout=deadline_s)
    try:
        async for message in call:
            assert not answer.finished, "news after the end"
            for delta in message.choices:
                assert delta.first_token_index == len(answer.tokens), "a gap or a duplicate"
                answer.tokens += [token.id for token in delta.tokens]
                answer.finished |= bool(delta.finish_reason)
            on_news()
    except grpc.aio.AioRpcError as error:
        answer.status, answer.details = error.code().name, error.details() or ""
    else:
        answer.status = "OK"
    finally:
        call.cancel()
        answer.seconds = time.monotonic() - began
    return answer


def check(answer: Answer, prompt: Sequence[int], count: int) -> None:
    """A request that ended well has all its tokens; any other has the first ones of them."""
    right = expected_tokens(prompt, len(answer.tokens), VOCAB, seed=SEED)
    assert answer.tokens == right, f"wrong tokens before {answer.status}"
    assert answer.finished == (len(answer.tokens) == count), answer
    assert answer.finished or answer.status != "OK", answer


class Load:
    """Clients that ask again and again until told to stop. Prompts are long and short."""

    def __init__(
        self, router: Service, *, clients: int, deadline_s: float, count: int = 24
    ) -> None:
        self.answers: list[Answer] = []
        self.num_streaming = 0
        self._address = router.address
        self._clients = clients
        self._deadline_s = deadline_s
        self._count = count
        self._stop = False
        self._changed = asyncio.Condition()

    @property
    def ends(self) -> Counter[str]:
        """Answers by status."""
        return Counter(answer.status for answer in self.answers)

    @property
    def slowest_s(self) -> float:
        """The longest that any client waited for its status."""
        return max(answer.seconds for answer in self.answers)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Load for as long as the block runs; at its end every client has had its last status."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            clients = [
                asyncio.create_task(self._client(channel, seed)) for seed in range(self._clients)
            ]
            try:
                yield self
                self._stop = True
                async with asyncio.timeout(self._deadline_s + 5):
                    await asyncio.gather(*clients)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until what the clients got makes the condition true."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def _client(self, channel: grpc.aio.Channel, seed: int) -> None:
        dice = random.Random(seed)
        while not self._stop:
            longest = dice.choice((30, 200, 600))
            prompt = [dice.randrange(1, VOCAB) for _ in range(dice.randrange(1, longest))]
            self.num_streaming += 1
            try:
                answer = await ask(channel, prompt, self._count, self._deadline_s)
            finally:
                self.num_streaming -= 1
            check(answer, prompt, self._count)
            self.answers.append(answer)
            async with self._changed:
                self._changed.notify_all()
