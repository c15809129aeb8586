"""From a client's message to a validated request."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
from dataclasses import replace

from services.router.auth import cache_salt
from services.router.model import ServedModel
from services.router.request import Request, sampling_for_workers
from services.router.tokenization import PromptEncoder
from splitserve import wire
from splitserve.errors import FieldViolation, InvalidRequest
from splitserve.sampling import SamplingLimits, SamplingParams, check_prompt
from splitserve.v1 import inference_pb2

ROLES = frozenset({"system", "user", "assistant"})
_REQUEST_ID = re.compile(r"[\x20-\x7e]{0,128}")
_PROMPT_PATHS = {"text": "text", "chat": "chat.messages", "tokens": "tokens.ids"}


class Intake:
    """Validates, tokenises and completes requests. Finds all that is wrong, not the first."""

    def __init__(self, model: ServedModel, encoder: PromptEncoder, *, share_cache: bool) -> None:
        self._model = model
        self._encoder = encoder
        self._share_cache = share_cache
        # Workers are shared by routers, so names must differ between them and their restarts.
        self._router_id = secrets.token_hex(4)
        self._numbers = itertools.count()

    async def request(
        self,
        message: inference_pb2.GenerateRequest,
        tenant: str,
        received_s: float,
        deadline_s: float,
    ) -> Request:
        """The request. Raises ModelNotFound, and InvalidRequest naming every field at fault."""
        self._model.check_name(message.model)
        limits = self._model.limits()
        params = wire.sampling_from_proto(message.sampling)
        found = _shape_violations(message)
        if params.stop and not self._encoder.has_tokenizer:
            found.append(FieldViolation("sampling.stop", "needs a tokenizer, this server has none"))
        prompt: list[int] = []
        if not found:
            try:
                prompt = await self._encoder.encode(message)
            except InvalidRequest as error:
                found = error.violations
        if found:
            raise InvalidRequest([*found, *params.violations(limits)])
        path = _PROMPT_PATHS[message.WhichOneof("prompt") or "text"]
        check_prompt(prompt, params, limits, path)
        _check_room(prompt, params, limits)
        params = self._complete(params, len(prompt), limits)
        request_id = message.request_id or f"req-{secrets.token_hex(8)}"
        return Request(
            id=request_id,
            key=f"{request_id}@{self._router_id}.{next(self._numbers)}",
            prompt=prompt,
            sampling=params,
            wire_sampling=sampling_for_workers(params),
            cache_salt=cache_salt(tenant, shared=self._share_cache),
            received_s=received_s,
            deadline_s=deadline_s,
            keep_special_tokens=message.keep_special_tokens,
            is_chat=message.HasField("chat"),
        )

    def canary(self, timeout_s: float, max_tokens: int) -> Request:
        """A request of the router's own. It shares no cache with any tenant or earlier canary."""
        now = asyncio.get_running_loop().time()
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
        number = next(self._numbers)
        return Request(
            id=f"canary-{number}",
            key=f"canary@{self._router_id}.{number}",
            prompt=[1, 2, 3, 4],
            sampling=params,
            wire_sampling=sampling_for_workers(params),
            cache_salt=secrets.token_bytes(16),
            received_s=now,
            deadline_s=now + timeout_s,
        )

    def _complete(
        self, params: SamplingParams, prompt_tokens: int, limits: SamplingLimits
    ) -> SamplingParams:
        """Decide what the client left open."""
        seed = secrets.randbits(64) if params.seed is None else params.seed
        max_tokens = params.max_tokens
        if max_tokens is None:
            room = limits.max_context_tokens - prompt_tokens
            wanted = max(self._model.default_max_tokens, params.min_tokens)
            max_tokens = min(wanted, limits.max_tokens, room)
        return replace(params, seed=seed, max_tokens=max_tokens)


def _check_room(prompt: list[int], params: SamplingParams, limits: SamplingLimits) -> None:
    """Raise InvalidRequest if the context has no room for the least output that is asked for."""
    room = limits.max_context_tokens - len(prompt)
    if params.max_tokens is None and params.min_tokens > room:
        raise InvalidRequest.single(
            "sampling.min_tokens",
            f"must be at most {room}, which is what {len(prompt)} prompt tokens leave of "
            f"the context of {limits.max_context_tokens}, got {params.min_tokens}",
        )


def _shape_violations(message: inference_pb2.GenerateRequest) -> list[FieldViolation]:
    """What is wrong with the message before its prompt is looked into."""
    found = []
    if not _REQUEST_ID.fullmatch(message.request_id):
        found.append(FieldViolation("request_id", "must be at most 128 printable ASCII characters"))
    kind = message.WhichOneof("prompt")
    if kind is None:
        found.append(FieldViolation("prompt", "one of text, chat and tokens must be set"))
    elif kind == "text" and not message.text:
        found.append(FieldViolation("text", "must not be empty"))
    elif kind == "tokens" and not message.tokens.ids:
        found.append(FieldViolation("tokens.ids", "must hold at least one token"))
    elif kind == "chat":
        found += _chat_violations(message.chat)
    return found


def _chat_violations(chat: inference_pb2.ChatPrompt) -> list[FieldViolation]:
    if not chat.messages:
        return [FieldViolation("chat.messages", "must hold at least one message")]
    return [
        FieldViolation(f"chat.messages[{index}].role", f"must be one of {', '.join(sorted(ROLES))}")
        for index, message in enumerate(chat.messages)
        if message.role not in ROLES
    ]
