"""A client at the front door: a router process in front of real tiers, with a tokenizer of words.

async with front_door(Suite(directory)) as door:
    error = await door.send(request)      # how a call ends, None for success
    await door.assert_unharmed()          # it still serves, exactly, and holds nothing
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import tokenizers
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from splitserve.engine.fake import expected_tokens
from splitserve.kv.control import StoreControl
from splitserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from ..suite import Service, Suite, eventually

VOCAB = 1000
CONTEXT = 256
MAX_TOKENS = 128
PROMPT = [7 + i % 50 for i in range(60)]
GENERATE = "/splitserve.v1.InferenceService/Generate"

Request = inference_pb2.GenerateRequest


def tokens(ids: list[int] = PROMPT, **fields: Any) -> Request:
    """A request of token ids; keywords that are fields of SamplingParams go there."""
    outer = {name: fields.pop(name) for name in ("model", "request_id") if name in fields}
    sampling = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **fields}
    return Request(
        tokens=inference_pb2.TokenPrompt(ids=ids),
        sampling=common_pb2.SamplingParams(**sampling),
        **outer,
    )


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'REFUSE' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.content == 'LOOP' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
    "{% if m.content == 'GROW' %}{{ 'x' * 9999999999 }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}"
)


def write_checkpoint(directory: Path) -> Path:
    """What a router reads of a model: token n is the word `n`, `?` is what is no word."""
    vocabulary = {"?": 0} | {str(token): token for token in range(1, VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return directory


@dataclass(eq=False)
class FrontDoor:
    """The processes, and a client's channel to the router."""

    suite: Suite
    store: Service
    prefill: Service
    decode: Service
    router: Service
    channel: grpc.aio.Channel
    control: StoreControl

    @property
    def stub(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def send(
        self, request: Message | bytes, *, method: str = GENERATE, timeout_s: float = 10.0
    ) -> grpc.aio.AioRpcError | None:
        """How a call ends, None for success. `request` may be bytes that are no message."""
        message = request if isinstance(request, bytes) else request.SerializeToString()
        call = self.channel.unary_stream(method)(message, timeout=timeout_s)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        return None

    async def ask(self, request: Request, **options: Any) -> list[inference_pb2.GenerateResponse]:
        """All messages of an answer."""
        call = self.stub.Generate(request, timeout=10, **options)
        return [message async for message in call]

    async def assert_unharmed(self) -> None:
        """The suite answers with exact tokens, and then no tier holds anything."""
        assert ids_of(await self.ask(tokens())) == expected_tokens(PROMPT, 4)

        async def nothing_held() -> bool:
            stats = await self.control.stats()
            return (stats.live_leases, stats.held_blocks, stats.reserved_blocks) == (0, 0, 0)

        await eventually(nothing_held)
        for worker in (self.prefill, self.decode):
            await worker.pages_free()


@contextlib.asynccontextmanager
async def front_door(
    suite: Suite,
    *,
    router_flags: tuple[str, ...] = (),
    worker_flags: tuple[str, ...] = (),
) -> AsyncIterator[FrontDoor]:
    """One process of each tier. The suite is closed by whoever made it."""
    suite.directory.mkdir(exist_ok=True)
    model = write_checkpoint(suite.directory)
    name = ("--model-name", "toy")
    store = await suite.kvstore()
    prefill, decode = [
        await start(store, *name, "--max-context-tokens", str(CONTEXT), *worker_flags)
        for start in (suite.prefill, suite.decode)
    ]
    caps = ("--max-tokens-cap", str(MAX_TOKENS), "--default-max-tokens", "16")
    router = await suite.router(
        [prefill], [decode], *name, "--model", str(model), *caps, *router_flags
    )
    control = StoreControl(store.address)
    try:
        async with router.channel() as channel:
            yield FrontDoor(suite, store, prefill, decode, router, channel, control)
    finally:
        await control.close()


def ids_of(messages: list[inference_pb2.GenerateResponse], choice: int = 0) -> list[int]:
    """The token ids of one choice."""
    return [
        token.id
        for message in messages
        for delta in message.choices
        if delta.index == choice
        for token in delta.tokens
    ]


def detail_of(error: grpc.aio.AioRpcError, kind: type[Message]) -> Any:
    """A detail of the status, None if it has none of that kind."""
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        detail = kind()
        if packed.Unpack(detail):
            return detail
    return None


def fields_of(error: grpc.aio.AioRpcError | None) -> set[str]:
    """The paths that BadRequest names; none if there is no BadRequest."""
    detail = detail_of(error, error_details_pb2.BadRequest) if error else None
    return {violation.field for violation in detail.field_violations} if detail else set()
