"""What clients must not send, through the real front door: the router in front of real tiers.

Each case is one row: a name, the request, the status, and the fields that `google.rpc.BadRequest`
names. After each, the suite answers a good request with exact tokens and holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from splitserve.v1 import inference_pb2

from ..suite import Suite
from .front_door import (
    CONTEXT,
    GENERATE,
    MAX_TOKENS,
    VOCAB,
    FrontDoor,
    Request,
    fields_of,
    front_door,
    tokens,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFERENCE = "splitserve.v1.InferenceService"
LIST = f"/{INFERENCE}/ListModels"
CONNECT = "/splitserve.v1.KvStoreService/Connect"

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
TOO_MUCH = grpc.StatusCode.RESOURCE_EXHAUSTED
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
UNKNOWN_METHOD = grpc.StatusCode.UNIMPLEMENTED

Chat = inference_pb2.ChatPrompt


@dataclass(frozen=True)
class Case:
    """One row. `request` may be bytes that are no message."""

    name: str
    request: Message | bytes
    status: grpc.StatusCode
    fields: set[str] = field(default_factory=set)
    timeout_s: float = 10.0
    method: str = GENERATE


def text(prompt: str, **fields: Any) -> Request:
    """A request of plain text."""
    request = tokens(**fields)
    request.text = prompt
    return request


def chat(*turns: tuple[str, str]) -> Request:
    """A conversation."""
    request = tokens()
    request.chat.SetInParent()
    request.chat.messages.extend(
        inference_pb2.ChatMessage(role=role, content=content) for role, content in turns
    )
    return request


def sampling_case(name: str, value: Any, *also: str) -> Case:
    """One field of SamplingParams out of its range."""
    shown = repr(value) if len(repr(value)) < 20 else f"{len(value)} of them"
    return Case(f"{name} {shown}", tokens(**{name: value}), INVALID, {f"sampling.{name}", *also})


NAN, INF = math.nan, math.inf
PROMPTS = [
    Case("no prompt at all", Request(), INVALID, {"prompt"}),
    Case("empty text", Request(text=""), INVALID, {"text"}),
    Case("chat without messages", Request(chat=Chat()), INVALID, {"chat.messages"}),
    Case("empty tokens", tokens([]), INVALID, {"tokens.ids"}),
    Case("unknown role", chat(("wizard", "5")), INVALID, {"chat.messages[0].role"}),
    Case(
        "second role empty",
        chat(("user", "5"), ("", "6")),
        INVALID,
        {"chat.messages[1].role"},
    ),
    Case("template refuses", chat(("user", "REFUSE")), INVALID, {"chat"}),
    Case("template loops for ever", chat(("user", "LOOP")), INVALID, {"chat"}),
    Case("template builds gigabytes", chat(("user", "GROW")), INVALID, {"chat"}),
    Case("prompt over the context", tokens([1] * (CONTEXT + 1)), INVALID, {"tokens.ids"}),
    Case("prompt and max_tokens over it", tokens([1] * 253), INVALID, {"tokens.ids"}),
    Case("text over the context", text("5 " * 300), INVALID, {"text"}),
    Case("chat over the context", chat(("user", "5 " * 300)), INVALID, {"chat.messages"}),
    Case("token id out of range", tokens([1, VOCAB]), INVALID, {"tokens.ids"}),
    Case("greatest token id", tokens([2**32 - 1]), INVALID, {"tokens.ids"}),
]
SAMPLING = [
    *(sampling_case("max_tokens", value) for value in (0, -1, MAX_TOKENS + 1, 2**31 - 1)),
    *(sampling_case("n", value) for value in (0, -1, 17, 2**31 - 1)),
    *(sampling_case("temperature", value) for value in (NAN, INF, -INF, -0.1, 1e300)),
    *(sampling_case("top_p", value) for value in (0.0, -0.5, 1.1, NAN, INF)),
    *(sampling_case("top_k", value) for value in (-1, -(2**31))),
    *(sampling_case("min_p", value) for value in (-0.1, 1.1, NAN)),
    *(sampling_case("repetition_penalty", value) for value in (0.0, -1.0, 10.5, NAN, INF)),
    *(sampling_case("presence_penalty", value) for value in (-2.1, 2.1, NAN, INF)),
    *(sampling_case("frequency_penalty", value) for value in (-2.1, 2.1, NAN, -INF)),
    *(sampling_case("stop", value) for value in ([""], ["a", ""], ["x"] * 17)),
    sampling_case("stop", ["x" * 257]),
    sampling_case("stop", ["é" * 129]),  # 258 bytes of 129 characters
    *(sampling_case("stop_token_ids", value) for value in ([1] * 65, [VOCAB], [2**32 - 1])),
    *(sampling_case("logprobs", value) for value in (-1, 21, 2**31 - 1)),
    *(sampling_case("min_tokens", value) for value in (-1, 5)),
    Case(
        "all at once",
        tokens([VOCAB], top_p=NAN, n=0, min_p=2.0),
        INVALID,
        {"tokens.ids", "sampling.top_p", "sampling.n", "sampling.min_p"},
    ),
]
NAMES = [
    Case("request_id too long", tokens(request_id="x" * 129), INVALID, {"request_id"}),
    Case("request_id of megabytes", tokens(request_id="x" * (2 << 20)), INVALID, {"request_id"}),
    Case("request_id with a newline", tokens(request_id="a\nb"), INVALID, {"request_id"}),
    Case("request_id with NUL", tokens(request_id="a\0"), INVALID, {"request_id"}),
    Case("request_id not ASCII", tokens(request_id="é"), INVALID, {"request_id"}),
    Case("unknown model", tokens(model="other"), NOT_FOUND),
    Case("model with ../", tokens(model="../toy"), NOT_FOUND),
    Case("model below itself", tokens(model="toy/../toy"), NOT_FOUND),
    Case("model with NUL", tokens(model="toy\0"), NOT_FOUND),
    Case("model of megabytes", tokens(model="x" * (2 << 20)), NOT_FOUND),
]
CALLS = [
    Case("deadline that has passed", tokens(), LATE, timeout_s=0.0),
    Case("deadline too near", tokens(), LATE, timeout_s=0.005),
    Case("message over the limit", text("x" * (5 << 20)), TOO_MUCH),
    Case("no message", b"\xff\xff\xff", INVALID, {"request"}),
    Case("truncated message", text("hello").SerializeToString()[:-3], INVALID, {"request"}),
    Case("text that is no UTF-8", b"\x12\x02\xff\xfe", INVALID, {"request"}),
    Case("groups without end", b"\x0b" * 10_000, INVALID, {"request"}),
    Case("unknown method", b"", UNKNOWN_METHOD, method=f"/{INFERENCE}/Nothing"),
    Case("unknown service", b"", UNKNOWN_METHOD, method="/splitserve.v1.Nothing/Generate"),
    Case("another tier's method", b"", UNKNOWN_METHOD, method=CONNECT),
    Case("no model for ListModels", b"\xff", INVALID, {"request"}, method=LIST),
]
ACCEPTED = [
    Case("least of everything", tokens([0], max_tokens=1, min_p=0.0, logprobs=0), OK),
    Case("whole context", tokens([1] * (CONTEXT - 4)), OK),
    Case("most of everything", tokens(n=16, logprobs=20, stop_token_ids=[VOCAB - 1] * 64), OK),
    Case("longest stops", tokens(stop=["é" * 128] * 16), OK),
    Case("least temperature", tokens(temperature=5e-324, seed=2**64 - 1), OK),
    Case("least penalty", tokens(repetition_penalty=5e-324), OK),
    Case("fields of a later version", tokens().SerializeToString() + b"\xf8\x7f\x01", OK),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[FrontDoor]:
    suite, failed_before = Suite(tmp_path_factory.mktemp("suite")), request.session.testsfailed
    try:
        async with front_door(suite) as opened:
            yield opened
    finally:
        await suite.close()
        if request.session.testsfailed > failed_before:
            suite.show_logs()


@pytest.mark.parametrize(
    "case", [*PROMPTS, *SAMPLING, *NAMES, *CALLS, *ACCEPTED], ids=lambda case: case.name
)
async def test_each_case_has_its_status_and_does_no_harm(door: FrontDoor, case: Case) -> None:
    error = await door.send(case.request, method=case.method, timeout_s=case.timeout_s)
    assert (error.code() if error else OK) is case.status, error
    assert fields_of(error) == case.fields
    await door.assert_unharmed()
