"""What a generation gives back, the same from `LLM` in one process and from `Client`.

The names are those that vLLM users know. A generation is a series of `OutputDelta`s, each what is
new since the one before; `OutputBuilder` puts them together into one `RequestOutput`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from splitserve.engine.protocol import Logprob
from splitserve.errors import SplitserveError

FinishName: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class PositionLogprobs:
    """Natural log-probabilities at one output position, under the model's raw distribution."""

    chosen: Logprob
    top: tuple[Logprob, ...] = ()
    """The most likely tokens, best first; as many as were asked for."""


@dataclass(frozen=True)
class Usage:
    """What was counted, in tokens."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    """Of all choices together."""


@dataclass(frozen=True)
class Timings:
    """Where the time went, in milliseconds, as the server measured it."""

    time_to_first_token_ms: float
    total_ms: float
    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of one choice. `text` may lag behind `token_ids` by what is undecided yet."""

    index: int
    first_token_index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    text: str = ""
    finish_reason: FinishName | None = None


@dataclass(frozen=True)
class OutputDelta:
    """What is new of one request. `usage` and `timings` come with the last delta only."""

    request_id: str
    choices: list[ChoiceDelta] = field(default_factory=list)
    usage: Usage | None = None
    timings: Timings | None = None
    seed: int | None = None
    """The seed in use, in the first delta."""


@dataclass(frozen=True)
class CompletionOutput:
    """One of the n outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    """One entry a token, None if none were asked for."""
    finish_reason: FinishName | None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. `outputs` is sorted by index."""

    request_id: str
    prompt: str | None
    """The prompt as it was given; None where it was given as token ids or as a conversation."""
    prompt_token_ids: list[int] | None
    """None where the prompt was tokenised by a server."""
    outputs: list[CompletionOutput]
    usage: Usage | None = None
    timings: Timings | None = None
    seed: int | None = None


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishName | None = None


class OutputBuilder:
    """Puts the deltas of one request together and checks that no token is missing or double."""

    def __init__(self, prompt: str | None, prompt_token_ids: list[int] | None) -> None:
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._choices: dict[int, _Choice] = {}
        self._request_id = ""
        self._usage: Usage | None = None
        self._timings: Timings | None = None
        self._seed: int | None = None

    def add(self, delta: OutputDelta) -> None:
        """Takes the next delta. Raises `SplitserveError` for a gap or a duplicate."""
        self._request_id = delta.request_id or self._request_id
        self._usage = delta.usage or self._usage
        self._timings = delta.timings or self._timings
        if delta.seed is not None:
            self._seed = delta.seed
        for choice in delta.choices:
            self._add_choice(choice)

    def extend(self, deltas: Iterable[OutputDelta]) -> RequestOutput:
        """Takes all deltas and returns the finished request."""
        for delta in deltas:
            self.add(delta)
        return self.build()

    def build(self) -> RequestOutput:
        """The request as far as it has come."""
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index, "".join(c.text), list(c.token_ids), c.logprobs, c.finish_reason
                )
                for index, c in sorted(self._choices.items())
            ],
            usage=self._usage,
            timings=self._timings,
            seed=self._seed,
        )

    def _add_choice(self, delta: ChoiceDelta) -> None:
        choice = self._choices.setdefault(delta.index, _Choice())
        if delta.token_ids and delta.first_token_index != len(choice.token_ids):
            raise SplitserveError(
                f"choice {delta.index}: token {delta.first_token_index} came where token "
                f"{len(choice.token_ids)} was due"
            )
        choice.text.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + delta.logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason
