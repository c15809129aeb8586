"""A router's Submit, checked and in the library's own types."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opentelemetry.context import Context

from splitserve import wire
from splitserve.errors import FieldViolation, InvalidRequest
from splitserve.kv.layout import Lease
from splitserve.obs import tracing
from splitserve.sampling import SamplingLimits, SamplingParams, check_prompt
from splitserve.v1 import decode_pb2


@dataclass(frozen=True)
class Submission:
    """One request as a decode worker takes it on.

    `outputs` has the output so far of each choice that is to be computed. `deadline_s` is seconds
    from now, None for no deadline.
    `first_tag` is the router's tag of choice 0, and the next ones are the others'; 0: none.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    cache_salt: bytes
    lease: Lease | None
    outputs: dict[int, list[int]]
    parent: Context
    deadline_s: float | None
    first_tag: int = 0

    @property
    def awaits_first_tokens(self) -> bool:
        """Whether a prefill worker draws the first tokens."""
        return self.lease is not None


def parse(
    message: decode_pb2.Submit,
    limits: SamplingLimits,
) -> Submission:
    """Check a Submit.

    Raises:
        InvalidRequest: a field is missing or out of range; every one is named.
    """
    prompt = list(message.prompt_token_ids)
    params = _bounded(wire.sampling_from_proto(message.sampling), len(prompt), limits)
    wire.check_request_id(message.request_id)
    check_prompt(prompt, params, limits, prefix="prompt_token_ids")
    seed = wire.seed_of(message.sampling)
    if message.first_tag + params.n > 1 << 64:
        raise InvalidRequest.single("first_tag", f"leaves no room for {params.n} tags below 2^64")
    return Submission(
        request_id=message.request_id,
        prompt=prompt,
        params=params,
        seed=seed,
        cache_salt=message.cache_salt,
        lease=_lease(message),
        outputs=_outputs(message, params, limits),
        parent=tracing.extract(message.trace_context),
        deadline_s=message.timeout_ms / 1000 if message.timeout_ms else None,
        first_tag=message.first_tag,
    )


def _bounded(params: SamplingParams, prompt_tokens: int, limits: SamplingLimits) -> SamplingParams:
    """A request that does not say when to end does so where the context does."""
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, limits.max_context_tokens - prompt_tokens))


def _lease(message: decode_pb2.Submit) -> Lease | None:
    if not message.HasField("lease"):
        return None
    if message.resume:
        raise InvalidRequest.single("resume", "must be empty with a lease: it is computed here")
    return wire.lease_from_proto(message.lease)


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
