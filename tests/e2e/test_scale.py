"""A thousand streams on one router at once, and memory that stays flat over many requests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

from ..leftovers import nothing_held
from ..load import Answer, ask, check
from ..suite import ROOT, Suite
from .tiers import start_tiers

STREAMS = 1000
TOKENS = 16
DEADLINE_S = 60.0
LEASE_S = 3.0
WIDE = (
    *("--max-batch", str(STREAMS), "--max-step-tokens", "2048"),
    *("--pool-bytes", str(16384 * 512)),
)
STEP_MS = "700"
"""No stream ends sooner than 15 of these after it began, and by then all are open."""

REQUESTS, MARK = 2000, 1000
FLAT_MIB = 6.0
"""What an allocator may vary by at rest; 1,000 requests that left 10 KB each would be over."""


async def test_a_thousand_open_streams(suite: Suite) -> None:
    tiers = await start_tiers(
        suite,
        *WIDE,
        decode_flags=("--fake-step-ms", STEP_MS),
        router_flags=("--lease-ttl-ms", str(round(1000 * LEASE_S))),
    )
    # Every fourth goes through the prefill tier and the store.
    prompts = [[1 + n % 997, 1 + n // 997, *range(1, 8 if n % 4 else 40)] for n in range(STREAMS)]
    begun: set[int] = set()
    all_begun = asyncio.Event()
    too_early: list[int] = []

    async def client(number: int) -> Answer:
        def on_news() -> None:
            begun.add(number)
            if len(begun) == STREAMS:
                all_begun.set()

        answer = await ask(channel, prompts[number], TOKENS, DEADLINE_S, on_news=on_news)
        if not all_begun.is_set():
            too_early.append(number)
        return answer

    began = time.monotonic()
    async with tiers.router.channel() as channel:
        clients = [asyncio.create_task(client(number)) for number in range(STREAMS)]
        async with asyncio.timeout(DEADLINE_S):
            await all_begun.wait()
        print(f"{STREAMS} streams had begun after {time.monotonic() - began:.2f} s")
        most_open = (await tiers.router.metrics())["splitserve_num_requests_running"]
        answers = await asyncio.gather(*clients)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status == "OK", answer.details
        check(answer, prompt, TOKENS)
    assert (most_open, too_early) == (STREAMS, [])
    await nothing_held(*tiers.all, within_s=LEASE_S + 1.0)


def test_memory_is_flat(tmp_path: Path) -> None:
    """A short run of `benchmarks/soak.py`, which takes 10,000 requests by itself."""
    result = tmp_path / "soak.json"
    command = [sys.executable, "benchmarks/soak.py", "--json", str(result)]
    counts = ["--requests", str(REQUESTS), "--marks", str(MARK)]
    subprocess.run([*command, *counts], cwd=ROOT, check=True, timeout=100)
    soak = json.loads(result.read_text())
    assert soak["wrong"] == 0
    assert soak["growth_mib"].keys() == {"router", "prefill", "decode", "kvstore"}
    assert max(soak["growth_mib"].values()) < FLAT_MIB, soak["own_mib"]
