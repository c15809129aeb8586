"""What the client saw of one request, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class RequestRecord:
    """Times are in seconds by one monotonic clock.

    `token_times_s[i]` is when message i came, with `token_counts[i]` >= 1 new tokens. Inter-token
    latency is taken as vLLM's benchmark takes it: one sample a message, the time since the message
    before it, however many tokens it carries. Time per output token spreads the same time over the
    tokens, so that it does not depend on how tokens are put into messages.
    """

    id: str
    prompt_tokens: int
    sent_s: float
    ended_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    error: str | None = None
    """One line; None for a request that succeeded."""

    @property
    def output_tokens(self) -> int:
        """How many came."""
        return sum(self.token_counts)

    @property
    def ttft_s(self) -> float:
        """From sending the request to its first token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending the request to its end."""
        return self.ended_s - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between messages with tokens."""
        times = self.token_times_s
        return [after - before for before, after in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.output_tokens - 1)
