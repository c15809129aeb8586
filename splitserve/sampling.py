"""What a user may ask of sampling, checked once where it enters.

The names and meanings are those of vLLM and TensorRT-LLM; each range is written in
`protos/splitserve/v1/common.proto` and enforced by `SamplingParams.violations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from splitserve.errors import FieldViolation, InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SamplingLimits:
    """A server's caps on what one request may ask."""

    vocab_size: int
    max_context_tokens: int
    max_tokens: int = 4096
    max_choices: int = 16


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one request. Defaults are those of vLLM.

    `max_tokens=None` means as many as the server allows and the context has room for.
    `logprobs=None` means none; 0 means the drawn token's own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def violations(self, limits: SamplingLimits, prefix: str = "sampling") -> list[FieldViolation]:
        """Every field that is out of its range, by its path under `prefix`."""
        return [
            FieldViolation(f"{prefix}.{name}", f"must be {rule}, got {value!r}")
            for name, value, ok, rule in self._checks(limits)
            if not ok
        ]

    def _checks(self, limits: SamplingLimits) -> list[tuple[str, object, bool, str]]:
        stops_fit = all(0 < len(s.encode()) <= MAX_STOP_BYTES for s in self.stop)
        ids_fit = all(0 <= t < limits.vocab_size for t in self.stop_token_ids)
        most = limits.max_tokens
        asked = self.max_tokens
        # One fault in max_tokens must not be told as two.
        length = asked if asked is not None and 1 <= asked <= most else most
        return [
            ("temperature", self.temperature, _within(self.temperature, 0, 1e6), "finite and >= 0"),
            ("top_p", self.top_p, _within(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0, where 0 keeps all"),
            ("min_p", self.min_p, _within(self.min_p, 0, 1), "in [0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _within(self.repetition_penalty, 0, 10) and self.repetition_penalty > 0,
                "in (0, 10]",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                _within(self.presence_penalty, -2, 2),
                "in [-2, 2]",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                _within(self.frequency_penalty, -2, 2),
                "in [-2, 2]",
            ),
            (
                "seed",
                self.seed,
                self.seed is None or 0 <= self.seed <= MAX_SEED,
                "an unsigned 64-bit integer",
            ),
            (
                "stop",
                len(self.stop),
                len(self.stop) <= MAX_STOP_STRINGS,
                f"at most {MAX_STOP_STRINGS} strings",
            ),
            (
                "stop",
                list(self.stop),
                stops_fit,
                f"strings of 1 to {MAX_STOP_BYTES} bytes",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids),
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
                f"at most {MAX_STOP_TOKEN_IDS} tokens",
            ),
            (
                "stop_token_ids",
                list(self.stop_token_ids)[:8],
                ids_fit,
                f"tokens below the vocabulary size {limits.vocab_size}",
            ),
            ("max_tokens", asked, asked is None or 1 <= asked <= most, f"in [1, {most}]"),
            (
                "min_tokens",
                self.min_tokens,
                0 <= self.min_tokens <= length,
                f"in [0, max_tokens = {length}]",
            ),
            (
                "logprobs",
                self.logprobs,
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"in [0, {MAX_LOGPROBS}]",
            ),
            ("n", self.n, 1 <= self.n <= limits.max_choices, f"in [1, {limits.max_choices}]"),
        ]

    def finish_after(
        self, token_id: int, num_output_tokens: int, eos_token_ids: frozenset[int]
    ) -> FinishReason | None:
        """Whether the choice ends with `token_id` as its `num_output_tokens`-th token."""
        if num_output_tokens >= self.min_tokens:
            if token_id in self.stop_token_ids:
                return FinishReason.STOP
            if not self.ignore_eos and token_id in eos_token_ids:
                return FinishReason.STOP
        if self.max_tokens is not None and num_output_tokens >= self.max_tokens:
            return FinishReason.LENGTH
        return None


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def check_prompt(
    token_ids: Sequence[int], params: SamplingParams, limits: SamplingLimits, prefix: str = "prompt"
) -> None:
    """Raise `InvalidRequest` naming all that is wrong with a tokenised request."""
    found = params.violations(limits)
    if not token_ids:
        found.append(FieldViolation(prefix, "must hold at least one token"))
    elif max(token_ids) >= limits.vocab_size or min(token_ids) < 0:
        found.append(
            FieldViolation(prefix, f"holds a token id not below the vocabulary {limits.vocab_size}")
        )
    # A max_tokens that is wrong in itself has been told; it must not be told as a long prompt too.
    wanted = min(max(params.max_tokens or 1, 1), limits.max_tokens)
    if len(token_ids) + wanted > limits.max_context_tokens:
        found.append(
            FieldViolation(
                prefix,
                f"{len(token_ids)} prompt tokens and max_tokens {wanted} exceed "
                f"the context of {limits.max_context_tokens} tokens",
            )
        )
    if found:
        raise InvalidRequest(found)
