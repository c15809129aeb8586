"""One output being generated: its tokens, its pages and where it stands."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple, Protocol

from splitserve.engine.protocol import DrawnToken
from splitserve.errors import SplitserveError
from splitserve.sampling import FinishReason, SamplingParams


class State(Enum):
    """Where a sequence stands.

    WAITING ──admit──▶ LOADING ──loaded, first token known──▶ READY ──▶ RUNNING ──▶ FINISHED
       ▲                                                                  │
       └───────────────────────────preempt────────────────────────────────┘

    A sequence with nothing to await passes LOADING and READY within one admission.
    """

    WAITING = auto()
    LOADING = auto()
    READY = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class PageLoad:
    """A block that should be brought into a page: its index in the sequence and its key."""

    index: int
    key: bytes
    page: int
    num_tokens: int


class KvSource(Protocol):
    """Where a sequence's KV comes from when it is not computed here."""

    def load(self, sequence: Sequence, blocks: abc.Sequence[PageLoad]) -> None:
        """Begin to fill the pages, without waiting. Called on the engine's thread.

        The source must answer with `EngineCore.loaded(sequence_id, num_blocks)` once nothing
        of it will touch the pages any more; `num_blocks` counts the filled ones from the first
        without a gap. What was not filled is computed.
        """
        ...


class KvSink(Protocol):
    """Where a prefilled sequence's KV goes. All methods must not wait. They are called on the
    engine's thread, but for `layers_done`: it may be called on another, and as late as after
    `blocks_done` of the same blocks and after `release`.

    After `begin` the pages stay as they are, also when the sequence is aborted, until
    `EngineCore.release(sequence_id)` is called, which must be called once in every case.
    """

    def begin(
        self, keys: abc.Sequence[bytes], pages: abc.Sequence[int], num_cached_blocks: int
    ) -> None:
        """The prompt's pages are allocated; the first `num_cached_blocks` are filled already."""
        ...

    def layers_done(
        self, first_block: int, end_block: int, first_layer: int, end_layer: int
    ) -> None:
        """Layers [first_layer, end_layer) of blocks [first_block, end_block) are in their pages."""
        ...

    def blocks_done(self, first_block: int, end_block: int) -> None:
        """All layers of the blocks are in their pages."""
        ...


@dataclass(eq=False)
class Sequence:
    """One choice of one request on one worker.

    `seed` has been decided by the router. `await_first_token` holds the sequence back until
    `EngineCore.first_token` brings the token that a prefill worker drew. `prefill_choices > 0`
    makes it a prefill: that many first tokens are drawn from the prompt's last position, and the
    pages are kept until `EngineCore.release`.

    A running sequence has a `slot`, its place in the batch, and had `came_from` when it was last
    computed, -1 if that is the same. `num_in_flight` counts the launched steps it has part in whose
    tokens have not been read back, `num_pending` the tokens among `num_tokens` that these draw.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    choice: int = 0
    cache_salt: bytes = b""
    output: list[int] = field(default_factory=list)
    source: KvSource | None = None
    sink: KvSink | None = None
    await_first_token: bool = False
    prefill_choices: int = 0

    state: State = State.WAITING
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_registered: int = 0
    loading: bool = False
    exporting: bool = False
    slot: int = -1
    came_from: int = -1
    num_in_flight: int = 0
    num_pending: int = 0
    num_preemptions: int = 0
    submitted_ns: int = field(default_factory=time.time_ns)
    scheduled_ns: int = 0
    first_token_ns: int = 0

    @property
    def is_live(self) -> bool:
        """Whether it has not ended, as far as its user knows."""
        return self.state is not State.FINISHED

    @property
    def is_held(self) -> bool:
        """Whether somebody may still touch its pages, ended or not."""
        return self.loading or self.exporting or self.num_in_flight > 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far, those being drawn included."""
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def draws_its_last(self) -> bool:
        """Whether a token that is being drawn is certain to be the last."""
        if not self.num_pending:
            return False
        most, drawn = self.params.max_tokens, len(self.output) + self.num_pending
        return bool(self.prefill_choices) or (most is not None and drawn >= most)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is not in the pool yet; the last one's step draws the next token."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens at positions [start, end), as far as they are known."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        return self.prompt[start:split] + self.output[max(0, start - split) : end - split]


class SequenceOutput(NamedTuple):
    """What one step made of one sequence. Given to `EngineCore`'s listener.

    `tokens` are new, the first at `first_token_index` of the output. A prefill's tokens are the
    first ones of its choices instead, with `finish_reasons` one for each. Exactly one output of
    each sequence is its last: it has `finish_reason` or `error` set, or `prefill_done`.
    """

    sequence: Sequence
    first_token_index: int
    tokens: tuple[DrawnToken, ...]
    finish_reason: FinishReason | None = None
    error: SplitserveError | None = None
    prefill_done: bool = False
    finish_reasons: tuple[FinishReason | None, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is a token's id and nothing else, and the sequence goes on."""
        return (
            self.finish_reason is None
            and len(self.tokens) == 1
            and self.tokens[0].logprob is None
            and self.error is None
            and not self.prefill_done
        )


StepListener = abc.Callable[[int, abc.Sequence[SequenceOutput]], None]
"""Called on the engine's thread as `listener(step_number, outputs)`. Must not wait."""
