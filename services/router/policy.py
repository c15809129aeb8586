"""Which worker gets a request. A policy is a class with two methods, registered by name here.

prefix-load    (default) the least work: prompt tokens that wait plus those not cached there for
               prefill; batch and KV occupancy, with a bonus for a cached prefix, for decode
least-loaded   the same without regard to what is cached
round-robin    one after the other

To add one: write a class that fits `Policy`, and a line in `POLICIES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.router.workers import Worker
from splitserve.errors import ConfigError

PREFIX_WEIGHT = 0.5
"""How much of a whole batch's load a wholly cached prompt is worth on a decode worker."""


@dataclass(frozen=True)
class Candidate:
    """A worker that could take the request, and how much of the prompt it need not compute."""

    worker: Worker
    cached_tokens: int = 0


class Policy(Protocol):
    """Chooses among candidates, of which there is at least one. Must not wait."""

    def choose_prefill(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """Who computes the prompt."""
        ...

    def choose_decode(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """Who generates."""
        ...


class PrefixLoad:
    """Least work, counting what is cached."""

    def choose_prefill(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The one that is expected to have the prompt done first."""
        rates = [candidate.worker.state for candidate in candidates]
        comparable = all(state is not None and state.prefill_tokens_per_s > 0 for state in rates)

        def cost(candidate: Candidate) -> tuple[float, int]:
            worker = candidate.worker
            tokens = float(worker.queued_tokens + prompt_tokens - candidate.cached_tokens)
            if comparable and worker.state is not None:
                tokens /= worker.state.prefill_tokens_per_s
            return tokens, worker.own_requests

        return min(candidates, key=cost)

    def choose_decode(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The one with the most room, less a bonus for the prefix that it has."""

        def cost(candidate: Candidate) -> tuple[float, int]:
            uncached = 1.0 - candidate.cached_tokens / max(prompt_tokens, 1)
            return load_of(
                candidate.worker
            ) + PREFIX_WEIGHT * uncached, candidate.worker.own_requests

        return min(candidates, key=cost)


class LeastLoaded:
    """Least work, as if nothing were cached."""

    def choose_prefill(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The one with the fewest prompt tokens waiting."""
        return min(candidates, key=lambda c: (c.worker.queued_tokens, c.worker.own_requests))

    def choose_decode(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The one with the most room."""
        return min(candidates, key=lambda c: (load_of(c.worker), c.worker.own_requests))


class RoundRobin:
    """One after the other, in the order of their addresses."""

    def __init__(self) -> None:
        self._prefill_turn = itertools.count()
        self._decode_turn = itertools.count()

    def choose_prefill(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The next one."""
        return _nth(candidates, next(self._prefill_turn))

    def choose_decode(self, candidates: Sequence[Candidate], prompt_tokens: int) -> Candidate:
        """The next one."""
        return _nth(candidates, next(self._decode_turn))


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "prefix-load": PrefixLoad,
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
}


def make_policy(name: str) -> Policy:
    """A new policy of that name. Raises ConfigError."""
    if name not in POLICIES:
        raise ConfigError(f"policy: {name!r} is none of {', '.join(POLICIES)}")
    return POLICIES[name]()


def load_of(worker: Worker) -> float:
    """How full a decode worker is: 1 is a full batch or a full pool, more means a queue."""
    if worker.state is None:
        return float("inf")
    batch = worker.num_requests / max(worker.state.max_batch, 1)
    held = worker.state.total_pages - worker.state.free_pages
    return max(batch, held / max(worker.state.total_pages, 1))


def _nth(candidates: Sequence[Candidate], turn: int) -> Candidate:
    ordered = sorted(candidates, key=lambda candidate: candidate.worker.address)
    return ordered[turn % len(ordered)]
