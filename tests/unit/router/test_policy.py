"""Who gets a request, by load and by prefix."""

from __future__ import annotations

from typing import Any, cast

import pytest

from services.router.policy import POLICIES, Candidate, load_of, make_policy
from services.router.workers import Worker
from splitserve.errors import ConfigError
from splitserve.v1 import worker_pb2


def worker(address: str, *, own_requests: int = 0, own_tokens: int = 0, **state: Any) -> Worker:
    made = Worker(address, cast(Any, None))
    made.state = worker_pb2.WorkerState(
        **{"total_pages": 100, "free_pages": 100, "max_batch": 10, **state}
    )
    made.own_requests, made.own_tokens = own_requests, own_tokens
    return made


def test_prefix_beats_a_shorter_queue_only_if_it_saves_more() -> None:
    policy = make_policy("prefix-load")
    idle, cached = worker("idle"), worker("cached", queued_tokens=100)
    candidates = [Candidate(idle), Candidate(cached, cached_tokens=400)]
    assert policy.choose_prefill(candidates, 500).worker is cached
    candidates = [Candidate(idle), Candidate(cached, cached_tokens=50)]
    assert policy.choose_prefill(candidates, 500).worker is idle


def test_prefill_speed_counts() -> None:
    policy = make_policy("prefix-load")
    fast = worker("fast", queued_tokens=500, prefill_tokens_per_s=1000.0)
    slow = worker("slow", prefill_tokens_per_s=100.0)
    assert policy.choose_prefill([Candidate(slow), Candidate(fast)], 500).worker is fast


def test_own_requests_count_before_the_worker_reports_them() -> None:
    policy = make_policy("least-loaded")
    told = worker("told", queued_tokens=10)
    given = worker("given", own_tokens=20, own_requests=1)
    assert policy.choose_prefill([Candidate(given), Candidate(told)], 5).worker is told
    given = worker("given", own_requests=3)
    told = worker("told", running=1, waiting=1)
    assert policy.choose_decode([Candidate(given), Candidate(told)], 5).worker is told


def test_decode_load() -> None:
    assert load_of(worker("a", running=5)) == 0.5
    assert load_of(worker("a", running=1, free_pages=20)) == 0.8
    assert load_of(worker("a", running=10, waiting=5)) == 1.5
    policy = make_policy("prefix-load")
    full, cached = worker("full", running=10), worker("cached", running=3)
    assert policy.choose_decode([Candidate(full, 100), Candidate(cached)], 100).worker is cached
    idle = worker("idle")
    chosen = policy.choose_decode([Candidate(idle), Candidate(cached, 100)], 100)
    assert chosen.worker is cached


def test_round_robin() -> None:
    policy = make_policy("round-robin")
    candidates = [Candidate(worker("b")), Candidate(worker("a"))]
    order = [policy.choose_decode(candidates, 1).worker.address for _ in range(4)]
    assert order == ["a", "b", "a", "b"]
    assert policy.choose_prefill(candidates, 1).worker.address == "a"


def test_names() -> None:
    assert set(POLICIES) == {"prefix-load", "least-loaded", "round-robin"}
    with pytest.raises(ConfigError, match="policy"):
        make_policy("best")
