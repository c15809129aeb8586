"""A router's Submit, checked and in the library's own types."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from opentelemetry.context import Context

from splitserve import wire
from splitserve.errors import DeadlineExceeded, FieldViolation, InvalidRequest
from splitserve.kv.layout import Lease
from splitserve.obs import tracing
from splitserve.sampling import SamplingLimits, SamplingParams, check_prompt
from splitserve.v1 import decode_pb2


@dataclass(frozen=True)
class Submission:
    """One request as a decode worker takes it on.

    `outputs` has the output so far of each choice that is to be computed. `resumed` requests go
    on after their first worker was lost. `deadline_s` is seconds from now, None for no deadline.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    cache_salt: bytes
    lease: Lease | None
    outputs: dict[int, list[int]]
    resumed: bool
    parent: Context
    deadline_s: float | None

    @property
    def awaits_first_tokens(self) -> bool:
        """Whether a prefill worker draws the first tokens."""
        return self.lease is not None and not self.resumed


def parse(
    message: decode_pb2.Submit,
    limits: SamplingLimits,
    now_s: Callable[[], float] = time.time,
) -> Submission:
    """Check a Submit.

    Raises:
        InvalidRequest: a field is missing or out of range; every one is named.
        DeadlineExceeded: the deadline has passed already.
    """
    prompt = list(message.prompt_token_ids)
    params = _bounded(wire.sampling_from_proto(message.sampling), len(prompt), limits)
    wire.check_request_id(message.request_id)
    check_prompt(prompt, params, limits, prefix="prompt_token_ids")
    seed = wire.seed_of(message.sampling)
    return Submission(
        request_id=message.request_id,
        prompt=prompt,
        params=params,
        seed=seed,
        cache_salt=message.cache_salt,
        lease=wire.lease_from_proto(message.lease) if message.HasField("lease") else None,
        outputs=_outputs(message, params, limits),
        resumed=bool(message.resume),
        parent=tracing.extract(message.trace_context),
        deadline_s=_deadline_s(message.deadline_unix_ms, now_s()),
    )


def _bounded(params: SamplingParams, prompt_tokens: int, limits: SamplingLimits) -> SamplingParams:
    """A request that does not say when to end does so where the context does."""
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, limits.max_context_tokens - prompt_tokens))


def _outputs(
    message: decode_pb2.Submit, params: SamplingParams, limits: SamplingLimits
) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {choice: [] for choice in range(params.n)}
    seen: set[int] = set()
    for progress in message.resume:
        tokens = list(progress.token_ids)
        fault = None
        if progress.index >= params.n:
            fault = f"index {progress.index} is not below n = {params.n}"
        elif progress.index in seen:
            fault = f"index {progress.index} is named twice"
        elif any(token >= limits.vocab_size for token in tokens):
            fault = f"holds a token id not below the vocabulary {limits.vocab_size}"
        elif not progress.finished and len(tokens) >= (params.max_tokens or 1):
            fault = f"has {len(tokens)} tokens already, with max_tokens {params.max_tokens}"
        if fault:
            raise InvalidRequest([FieldViolation("resume", fault)])
        seen.add(progress.index)
        if progress.finished:
            del outputs[progress.index]
        else:
            outputs[progress.index] = tokens
    if not outputs:
        raise InvalidRequest.single("resume", "every choice has finished; nothing is left to do")
    return outputs


def _deadline_s(deadline_unix_ms: int, now_s: float) -> float | None:
    if deadline_unix_ms == 0:
        return None
    left_s = deadline_unix_ms / 1000 - now_s
    if left_s <= 0:
        raise DeadlineExceeded("the deadline had passed when the decode worker got the request")
    return left_s
