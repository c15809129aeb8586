"""One request in a router's stream: the choices that live and what its trace will say."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from services.decode.submission import Submission
from splitserve.engine.sequence import Sequence
from splitserve.worker.block_loader import BlockLoader


@dataclass(eq=False, slots=True)
class LiveChoice:
    """One choice of a request. `tag` is the router's, 0 if it has given none.
    `last_token_ns` is 0 before its first news.
    """

    request: LiveRequest
    index: int
    tag: int
    sequence: Sequence
    last_token_ns: int = 0


@dataclass(eq=False)
class LiveRequest:
    """A request from its Submit to the end of its last choice. Times are Unix nanoseconds."""

    submission: Submission
    loader: BlockLoader | None
    choices: dict[int, LiveChoice] = field(default_factory=dict)
    started: bool = False
    deadline: asyncio.TimerHandle | None = None
    received_ns: int = field(default_factory=time.time_ns)
    scheduled_ns: int = 0
    first_token_ns: int = 0
    num_tokens: int = 0
    num_cached: int = 0
    num_preemptions: int = 0

    @property
    def request_id(self) -> str:
        """The router's name for it."""
        return self.submission.request_id

    def close(self) -> None:
        """Stop the deadline's clock."""
        if self.deadline:
            self.deadline.cancel()
