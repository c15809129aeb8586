"""Scripted workers and a store behind real gRPC servers, and a whole router in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.router.__main__ import Router, started
from services.router.config import RouterConfig
from splitserve.config import load
from splitserve.engine.fake import expected_tokens
from splitserve.obs.tracing import Tracing
from splitserve.rpc.server import RpcServer
from splitserve.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

VOCAB = 1000
CONTEXT = 512
LAYOUT = common_pb2.KvLayout(model_fingerprint=b"f" * 32, block_tokens=4, block_bytes=64)
MODEL = "toy"


def tokens_after(prompt: list[int], count: int, choice: int = 0) -> list[int]:
    """What the scripted workers generate: the fake engine's sums, other ones for each choice."""
    return expected_tokens([*prompt[:-1], (prompt[-1] + choice) % VOCAB], count, VOCAB)


class ScriptedState(worker_pb2_grpc.WorkerServiceServicer):
    """Tells a state that a test may change."""

    def __init__(self, worker_id: str, store_address: str) -> None:
        self.state = worker_pb2.WorkerState(
            worker_id=worker_id,
            model=MODEL,
            kv_layout=LAYOUT,
            store_address=store_address,
            total_pages=100,
            free_pages=100,
            max_batch=8,
            max_step_tokens=4,
            ready=True,
            max_context_tokens=CONTEXT,
        )

    async def WatchState(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield worker_pb2.WatchStateResponse(state=self.state)
            await asyncio.sleep(0.02)


@dataclass
class ScriptedPrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Draws the first tokens, when `gate` is set. `fail` raises instead."""

    requests: list[prefill_pb2.PrefillRequest] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail: Exception | None = None
    cancelled: int = 0
    cached_tokens: int = 0
    finish_reason: int = 0
    receipt: common_pb2.KvReceipt | None = None
    address: str = ""

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> Any:
        if not request.request_id.startswith("canary"):
            self.requests.append(request)
        if self.fail is not None:
            raise self.fail
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        prompt = list(request.prompt_token_ids)
        return prefill_pb2.PrefillResponse(
            first_tokens=[
                prefill_pb2.FirstToken(
                    token=common_pb2.Token(id=tokens_after(prompt, 1, choice)[0]),
                    finish_reason=self.finish_reason,
                )
                for choice in range(request.sampling.n)
            ],
            cached_tokens=self.cached_tokens,
            queue_ms=1.5,
            compute_ms=2.5,
            kv_receipt=self.receipt,
        )


@dataclass
class Live:
    """A request on the scripted decode worker."""

    submit: decode_pb2.Submit
    outputs: dict[int, int]
    started: bool


@dataclass
class ScriptedDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Generates one token a step for every request, at most `hold_at` each until it is None."""

    submits: list[decode_pb2.Submit] = field(default_factory=list)
    starts: list[decode_pb2.Start] = field(default_factory=list)
    cancels: list[decode_pb2.Cancel] = field(default_factory=list)
    live: dict[str, Live] = field(default_factory=dict)
    hold_at: int | None = None
    skip_index_at: int | None = None
    uneven_at: int | None = None
    error: decode_pb2.SequenceError | None = None
    step_s: float = 0.0
    endless: bool = False
    address: str = ""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def Attach(self, commands: Any, context: Any) -> None:
        mine: dict[str, Live] = {}
        reader = asyncio.create_task(self._read(commands, mine))
        try:
            for step in itertools.count(1):
                news = decode_pb2.AttachResponse(step=step)
                for delta in self._step(mine):
                    _tell(news, delta, mine)
                    if self.uneven_at == delta.first_token_index:
                        news.tokens.tags.append(0)
                if news.deltas or news.tokens.tags:
                    await context.write(news)
                    await asyncio.sleep(self.step_s)
                else:
                    self.wake.clear()
                    await self.wake.wait()
        finally:
            reader.cancel()
            for name in mine:
                self.live.pop(name, None)

    def release(self) -> None:
        self.hold_at = None
        self.wake.set()

    async def _read(self, commands: Any, mine: dict[str, Live]) -> None:
        async for command in commands:
            self._handle(command, mine)
            self.wake.set()

    def _handle(self, command: decode_pb2.AttachRequest, mine: dict[str, Live]) -> None:
        kind = command.WhichOneof("command")
        if kind == "submit":
            submit = command.submit
            if not submit.request_id.startswith("canary"):
                self.submits.append(submit)
            outputs = dict.fromkeys(range(submit.sampling.n), 0)
            for progress in submit.resume:
                outputs[progress.index] = len(progress.token_ids)
                if progress.finished:
                    del outputs[progress.index]
            live = Live(submit, outputs, started=not submit.HasField("lease"))
            mine[submit.request_id] = self.live[submit.request_id] = live
        elif kind == "start":
            if not command.start.request_id.startswith("canary"):
                self.starts.append(command.start)
            live = mine[command.start.request_id]
            live.started = True
            live.outputs = dict.fromkeys(live.outputs, 1)
        elif kind == "cancel":
            name = command.cancel.request_id
            live_or_none = mine.get(name)
            if not name.startswith("canary"):
                self.cancels.append(command.cancel)
            if live_or_none is None:
                return
            if command.cancel.HasField("choice"):
                live_or_none.outputs.pop(command.cancel.choice, None)
            else:
                live_or_none.outputs.clear()
            self._forget_if_ended(name, mine)

    def _step(self, mine: dict[str, Live]) -> list[decode_pb2.SequenceDelta]:
        deltas = []
        for name, live in list(mine.items()):
            if not live.started:
                continue
            for choice in list(live.outputs):
                delta = self._delta(name, live, choice)
                if delta is not None:
                    deltas.append(delta)
            self._forget_if_ended(name, mine)
        return deltas

    def _delta(self, name: str, live: Live, choice: int) -> decode_pb2.SequenceDelta | None:
        index = live.outputs[choice]
        canary = name.startswith("canary")
        if self.hold_at is not None and index >= self.hold_at and not canary:
            return None
        delta = decode_pb2.SequenceDelta(request_id=name, choice=choice, first_token_index=index)
        if self.error is not None and not canary:
            delta.error.CopyFrom(self.error)
            del live.outputs[choice]
            return delta
        if self.skip_index_at == index:
            delta.first_token_index += 1
        params = live.submit.sampling
        if self.endless and not canary:
            delta.tokens.extend([common_pb2.Token(id=1)] * 50)
            live.outputs[choice] += 50
            return delta
        token = tokens_after(list(live.submit.prompt_token_ids), index + 1, choice)[index]
        delta.tokens.append(common_pb2.Token(id=token))
        live.outputs[choice] += 1
        if live.outputs[choice] >= params.max_tokens:
            delta.finish_reason = common_pb2.FINISH_REASON_LENGTH
            del live.outputs[choice]
        return delta

    def _forget_if_ended(self, name: str, mine: dict[str, Live]) -> None:
        if name in mine and not mine[name].outputs:
            del mine[name], self.live[name]


def _tell(
    news: decode_pb2.AttachResponse, delta: decode_pb2.SequenceDelta, live: dict[str, Live]
) -> None:
    """In short where nothing but a token is to be told."""
    is_plain = len(delta.tokens) == 1 and not delta.finish_reason and not delta.HasField("error")
    if not is_plain or delta.first_token_index == 0:
        news.deltas.append(delta)
        return
    news.tokens.tags.append(live[delta.request_id].submit.first_tag + delta.choice)
    news.tokens.token_indexes.append(delta.first_token_index)
    news.tokens.token_ids.append(delta.tokens[0].id)


@dataclass
class ScriptedStore(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Grants leases and knows the prefixes a test tells it of."""

    live: set[str] = field(default_factory=set)
    granted: int = 0
    holders: dict[str, int] = field(default_factory=dict)
    lookups: list[kvstore_pb2.LookupBlocksRequest] = field(default_factory=list)
    address: str = ""

    async def GrantLease(self, request: Any, context: Any) -> Any:
        self.granted += 1
        lease = f"lease-{self.granted}"
        self.live.add(lease)
        return kvstore_pb2.GrantLeaseResponse(
            lease=common_pb2.LeaseRef(lease_id=lease, epoch=1, store_address=self.address)
        )

    async def RenewLeases(self, request: Any, context: Any) -> Any:
        return kvstore_pb2.RenewLeasesResponse()

    async def ReleaseLeases(self, request: Any, context: Any) -> Any:
        self.live -= {lease.lease_id for lease in request.leases}
        return kvstore_pb2.ReleaseLeasesResponse()

    async def LookupBlocks(self, request: Any, context: Any) -> Any:
        self.lookups.append(request)
        return kvstore_pb2.LookupBlocksResponse(
            holders=[
                kvstore_pb2.PrefixHolder(holder_id=holder, num_blocks=num_blocks)
                for holder, num_blocks in self.holders.items()
            ]
        )


@dataclass
class Suite:
    """Everything a test looks at."""

    prefills: list[ScriptedPrefill]
    decodes: list[ScriptedDecode]
    states: dict[str, ScriptedState]
    servers: dict[str, RpcServer]
    store: ScriptedStore
    router: Router
    channel: grpc.aio.Channel
    serve: Callable[[str], Awaitable[RpcServer]]

    @property
    def stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def prefill(self) -> ScriptedPrefill:
        return self.prefills[0]

    @property
    def decode(self) -> ScriptedDecode:
        return self.decodes[0]

    def make_request(self, **fields: Any) -> Any:
        return make_request(**fields)

    async def kill(self, address: str) -> None:
        await self.servers[address].stop()

    async def bring_back(self, address: str) -> None:
        """Another run of a process at the same address."""
        state = self.states.get(address)
        if state is not None:
            state.state.worker_id += "+"
        self.servers[address] = await self.serve(address)

    async def generate(self, timeout: float = 10.0, **fields: Any) -> list[Any]:
        """All messages of one request."""
        call = self.stub.Generate(make_request(**fields), timeout=timeout)
        return [message async for message in call]

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.005)

    async def assert_nothing_left(self) -> None:
        """No request has left anything behind, on any tier."""
        router = self.router
        await self.until(lambda: not router.generation.num_open)
        await self.until(lambda: not router.links.num_sessions)
        assert router.links.num_tags == 0
        await self.until(lambda: not any(decode.live for decode in self.decodes))
        await self.until(lambda: not self.store.live and not router.stores.num_leases)
        assert router.admission.running == 0
        assert router.admission.waiting == 0
        assert router.admission.queued_tokens == 0
        for pool in router.pools:
            assert [(w.own_requests, w.own_tokens) for w in pool.known()] == [
                (0, 0) for _ in pool.known()
            ]


def make_request(
    prompt: list[int] | None = None, model: str = "", request_id: str = "", **sampling: Any
) -> inference_pb2.GenerateRequest:
    sampling.setdefault("max_tokens", 8)
    sampling.setdefault("temperature", 0.0)
    return inference_pb2.GenerateRequest(
        model=model,
        tokens=inference_pb2.TokenPrompt(ids=PROMPT if prompt is None else prompt),
        sampling=common_pb2.SamplingParams(**sampling),
        request_id=request_id,
    )


PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


def token_ids(messages: list[Any], choice: int = 0) -> list[int]:
    """A choice's tokens; fails where an index has a gap or comes twice."""
    ids: list[int] = []
    for message in messages:
        for delta in message.choices:
            if delta.index == choice:
                assert delta.first_token_index == len(ids)
                ids += [token.id for token in delta.tokens]
    return ids


async def rest_of(call: Any) -> list[Any]:
    """The messages that are still to come. A call that `read` was used on cannot be iterated."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


StartSuite = Callable[..., Awaitable[Suite]]


@pytest.fixture
async def start_suite() -> AsyncIterator[StartSuite]:
    """Starts a suite: `await start_suite(prefills=2, flags=["--max-running", "1"])`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *,
            prefills: int = 1,
            decodes: int = 1,
            flags: list[str] | None = None,
            wait_ready: bool = True,
            tracing: Tracing | None = None,
        ) -> Suite:
            off = tracing or Tracing.off()
            return await _start(stack, prefills, decodes, flags or [], wait_ready, off)

        yield start


async def _start(
    stack: contextlib.AsyncExitStack,
    num_prefills: int,
    num_decodes: int,
    flags: list[str],
    wait_ready: bool,
    tracing: Tracing,
) -> Suite:
    servers: dict[str, RpcServer] = {}
    states: dict[str, ScriptedState] = {}

    adders: dict[str, Callable[[Any], None]] = {}

    async def listen(add: Callable[[Any], None], bind: str) -> RpcServer:
        server = RpcServer("scripted", bind)
        add(server.grpc)
        await server.start([])
        stack.push_async_callback(server.stop)
        return server

    async def serve(add: Callable[[Any], None]) -> str:
        server = await listen(add, "127.0.0.1:0")
        address = f"127.0.0.1:{server.port}"
        servers[address], adders[address] = server, add
        return address

    store = ScriptedStore()
    store.address = await serve(
        lambda s: kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(store, s)
    )
    workers: dict[str, list[Any]] = {"prefill": [], "decode": []}
    for tier, count in (("prefill", num_prefills), ("decode", num_decodes)):
        for number in range(count):
            state = ScriptedState(f"{tier}-{number}", store.address)
            worker: Any = ScriptedPrefill() if tier == "prefill" else ScriptedDecode()
            if tier == "prefill":
                worker.gate.set()

            def add(server: Any, worker: Any = worker, state: Any = state) -> None:
                if isinstance(worker, ScriptedPrefill):
                    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(worker, server)
                else:
                    decode_pb2_grpc.add_DecodeServiceServicer_to_server(worker, server)
                worker_pb2_grpc.add_WorkerServiceServicer_to_server(state, server)

            worker.address = await serve(add)
            states[worker.address] = state
            workers[tier].append(worker)
    config = load(
        RouterConfig,
        [
            "--port=0",
            "--skip-tokenizer-init",
            f"--model-name={MODEL}",
            f"--vocab-size={VOCAB}",
            "--local-prefill-tokens=0",
            f"--prefill={','.join(w.address for w in workers['prefill'])}",
            f"--decode={','.join(w.address for w in workers['decode'])}",
            *flags,
        ],
    )
    router = await stack.enter_async_context(started(config, tracing))
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{router.server.port}")
    stack.push_async_callback(channel.close)
    suite = Suite(
        *(workers["prefill"], workers["decode"], states, servers, store, router, channel),
        serve=lambda address: listen(adders[address], address),
    )
    if wait_ready:
        await suite.until(lambda: router.readiness.ready)
        store.lookups.clear()
        await suite.until(lambda: not store.live)
    return suite


@pytest.fixture
def tools() -> Any:
    """This module's helpers; test modules cannot import one another."""
    return SimpleNamespace(
        token_ids=token_ids, tokens_after=tokens_after, make_request=make_request, rest_of=rest_of
    )
