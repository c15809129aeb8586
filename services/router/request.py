"""One client's request after validation: everything that its way through the tiers depends on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from splitserve import wire
from splitserve.errors import DeadlineExceeded
from splitserve.sampling import SamplingParams
from splitserve.v1 import common_pb2

HOP_MARGIN_S = 0.05
"""Left over at each hop to turn the next one's answer into its own."""


@dataclass(frozen=True)
class Request:
    """A validated request.

    `id` is what the client called it, `key` its name on the workers, unique among all routers.
    `sampling` has `seed` and `max_tokens` set. `deadline_s` is on the event loop's clock, and so
    is `received_s`. `keep_special_tokens` concerns the text only.
    """

    id: str
    key: str
    prompt: list[int]
    sampling: SamplingParams
    wire_sampling: common_pb2.SamplingParams
    cache_salt: bytes
    received_s: float
    deadline_s: float
    keep_special_tokens: bool = False
    is_chat: bool = False

    @property
    def max_total_tokens(self) -> int:
        """Positions of KV that all its choices may come to need."""
        return self.sampling.n * (len(self.prompt) + (self.sampling.max_tokens or 0))

    def remaining_s(self) -> float:
        """Seconds that the next hop may take. Raises DeadlineExceeded if there are none."""
        left = self.deadline_s - asyncio.get_running_loop().time() - HOP_MARGIN_S
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the request could be completed")
        return left

    def timeout_ms(self) -> int:
        """`remaining_s` in whole milliseconds, at least 1. Raises DeadlineExceeded."""
        return min(max(1, int(self.remaining_s() * 1000)), 2**32 - 1)


def sampling_for_workers(params: SamplingParams) -> common_pb2.SamplingParams:
    """The message for prefill and decode. Stop texts stay behind: workers know tokens only."""
    return wire.sampling_to_proto(replace(params, stop=()))
