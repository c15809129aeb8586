"""A router's stream to a decode worker, driven by hand, and what workers say of themselves.

The services themselves are started by the fixture `suite`, see `tests/suite.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import pytest

from splitserve.rpc.channel import open_channel
from splitserve.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, worker_pb2

from ..suite import Service


@dataclass(eq=False)
class Choice:
    """What a decode worker has told of one choice. Checks that token indexes have no gap."""

    first_index: int | None = None
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: int = 0
    error: decode_pb2.SequenceError | None = None

    @property
    def ended(self) -> bool:
        return bool(self.finish_reason) or self.error is not None

    def take(self, delta: decode_pb2.SequenceDelta) -> None:
        assert not self.ended, "news of a choice that has ended"
        if delta.tokens:
            if self.first_index is None:
                self.first_index = delta.first_token_index
            assert delta.first_token_index == self.first_index + len(self.tokens)
        self.tokens += [token.id for token in delta.tokens]
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.finish_reason = delta.finish_reason
        self.error = delta.error if delta.HasField("error") else None


class Attachment:
    """A router's stream to a decode worker, driven by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = decode_pb2_grpc.DecodeServiceStub(channel).Attach()
        self.choices: dict[tuple[str, int], Choice] = {}
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.num_messages = 0
        self.num_in_short = 0
        self._tagged: dict[int, tuple[str, int]] = {}
        self.reading = asyncio.Event()
        self.reading.set()
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        lease: common_pb2.LeaseRef | None = None,
        max_tokens: int = 8,
        n: int = 1,
        seed: int | None = 7,
        temperature: float = 0.0,
        logprobs: int | None = None,
        **fields: object,
    ) -> None:
        sampling = common_pb2.SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            n=n,
            seed=seed,
            ignore_eos=True,
            logprobs=logprobs,
        )
        submit = decode_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            lease=lease,
            **fields,
        )
        if submit.first_tag:
            self._tagged.update((submit.first_tag + i, (request_id, i)) for i in range(n))
        await self.call.write(decode_pb2.AttachRequest(submit=submit))

    async def start(
        self,
        request_id: str,
        first_token_ids: Sequence[int],
        answer: prefill_pb2.PrefillResponse | None = None,
    ) -> None:
        """With the answer, its receipt goes along as a router passes it on."""
        start = decode_pb2.Start(
            request_id=request_id,
            first_token_ids=first_token_ids,
            kv_receipt=answer.kv_receipt if answer and answer.HasField("kv_receipt") else None,
        )
        await self.call.write(decode_pb2.AttachRequest(start=start))

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        cancel = decode_pb2.Cancel(request_id=request_id, choice=choice)
        await self.call.write(decode_pb2.AttachRequest(cancel=cancel))

    def choice(self, request_id: str, choice: int = 0) -> Choice:
        return self.choices.setdefault((request_id, choice), Choice())

    async def until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Wait until news make the condition true."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def result(self, request_id: str, choice: int = 0) -> Choice:
        """A choice that has ended."""
        seen = self.choice(request_id, choice)
        await self.until(lambda: seen.ended or self.status is not None)
        assert seen.ended, f"the stream ended first: {self.status} {self.details}"
        return seen

    async def close(self) -> None:
        self.call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                await self.reading.wait()
                message = await self.call.read()
                if message is grpc.aio.EOF:
                    break
                self.num_messages += 1
                for delta in message.deltas:
                    self.choice(delta.request_id, delta.choice).take(delta)
                self._take_tokens(message.tokens)
                await self._tell()
        except grpc.aio.AioRpcError:
            pass
        self.status, self.details = await self.call.code(), await self.call.details()
        await self._tell()

    def _take_tokens(self, news: decode_pb2.StepTokens) -> None:
        self.num_in_short += len(news.tags)
        for tag, index, token_id in zip(news.tags, news.token_indexes, news.token_ids, strict=True):
            tokens = [common_pb2.Token(id=token_id)]
            delta = decode_pb2.SequenceDelta(first_token_index=index, tokens=tokens)
            self.choice(*self._tagged[tag]).take(delta)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@pytest.fixture
async def attach() -> AsyncIterator[Callable[[Service], Attachment]]:
    """Opens streams to decode workers; they are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def open_attachment(service: Service) -> Attachment:
            channel = open_channel(service.address)
            stack.push_async_callback(channel.close)
            attachment = Attachment(channel)
            stack.push_async_callback(attachment.close)
            return attachment

        yield open_attachment


@pytest.fixture
def worker_state() -> Callable[[Service], Awaitable[worker_pb2.WorkerState]]:
    """One report of a worker."""
    return Service.worker_state


@pytest.fixture
def pages_free() -> Callable[[Service], Awaitable[None]]:
    """Waits until no live sequence holds a page."""
    return Service.pages_free
