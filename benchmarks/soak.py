"""Memory of the four services over many requests.

    python benchmarks/soak.py --requests 10000 --json out.json

The suite runs with the fake engine and with caches small enough to be full after a few hundred
requests: from the first mark on nothing has a reason to grow. Prompts are token ids, all
different, half of them long enough to take the way through prefill and store. Every twentieth
request is cancelled after its first token. A process's own memory is told apart from the arena
that it shares.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import describe_machine

from splitserve import SamplingParams
from splitserve.client import AsyncClient
from splitserve.engine.fake import expected_tokens
from splitserve.launcher.config import FAKE_VOCAB_SIZE, SuiteConfig
from splitserve.launcher.signals import StopSignals
from splitserve.launcher.suite import LocalSuite

SEED, OUTPUT_TOKENS = 7, 4
CANCELLED_EVERY = 20
TIERS = ("kvstore", "prefill", "decode", "router")
"""In the order in which the suite starts them."""

WORKER_FLAGS = ("--pool-bytes", str(2048 * 512))
FLAGS = {
    "kvstore": ("--arena-bytes", str(4 << 20)),
    "prefill": WORKER_FLAGS,
    "decode": WORKER_FLAGS,
}


@dataclass
class Soak:
    """What was measured. `own_mib` is, for each mark of requests, each tier's private memory."""

    requests: int
    concurrency: int
    seconds: float = 0.0
    requests_per_s: float = 0.0
    wrong: int = 0
    own_mib: dict[int, dict[str, float]] = field(default_factory=dict)
    shared_mib: dict[int, dict[str, float]] = field(default_factory=dict)
    growth_mib: dict[str, float] = field(default_factory=dict)
    """Of private memory from the first mark after 0 to the last."""


class Clients:
    """Concurrent clients that pause at each mark, so that memory is measured at rest."""

    def __init__(self, client: AsyncClient, soak: Soak) -> None:
        self._client = client
        self._soak = soak

    async def run(self, first: int, end: int) -> None:
        """Requests [first, end), `concurrency` at a time."""
        numbers = iter(range(first, end))
        await asyncio.gather(*(self._take(numbers) for _ in range(self._soak.concurrency)))

    async def _take(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._request(number)

    async def _request(self, number: int) -> None:
        dice = random.Random(number)
        prompt = [dice.randrange(1, FAKE_VOCAB_SIZE) for _ in range(dice.choice((8, 72)))]
        params = SamplingParams(
            max_tokens=OUTPUT_TOKENS, temperature=1.0, seed=SEED, ignore_eos=True
        )
        tokens: list[int] = []
        async with contextlib.aclosing(self._client.stream(prompt, params, timeout=60.0)) as stream:
            async for delta in stream:
                tokens += [token for choice in delta.choices for token in choice.token_ids]
                if number % CANCELLED_EVERY == 0:
                    break
        if tokens != expected_tokens(prompt, len(tokens), seed=SEED):
            self._soak.wrong += 1


def measure(requests: int, concurrency: int, marks: list[int]) -> Soak:
    """Run the suite and the clients; memory is taken at 0, at each mark and at the end."""
    soak = Soak(requests, concurrency)
    marks = sorted({mark for mark in marks if 0 < mark < requests} | {requests})
    config = SuiteConfig(engine="fake", flags=FLAGS, log_level="warning")
    with (
        tempfile.TemporaryDirectory() as logs,
        StopSignals() as signals,
        LocalSuite(config, signals, Path(logs)) as suite,
    ):
        suite.start()
        pids = dict(zip(TIERS, suite.pids, strict=True))
        take_memory(soak, 0, pids)
        asyncio.run(drive(soak, suite.target, marks, pids))
    first, last = soak.own_mib[marks[0]], soak.own_mib[marks[-1]]
    soak.growth_mib = {tier: round(last[tier] - first[tier], 2) for tier in TIERS}
    return soak


async def drive(soak: Soak, target: str, marks: list[int], pids: dict[str, int]) -> None:
    async with AsyncClient(target) as client:
        clients, done = Clients(client, soak), 0
        for mark in marks:
            began = time.monotonic()
            await clients.run(done, mark)
            soak.seconds += time.monotonic() - began
            take_memory(soak, mark, pids)
            print(f"{mark} requests: {soak.own_mib[mark]}", file=sys.stderr)
            done = mark
    soak.requests_per_s = round(soak.requests / soak.seconds, 1)


def take_memory(soak: Soak, mark: int, pids: dict[str, int]) -> None:
    memory = {tier: _memory(pid) for tier, pid in pids.items()}
    soak.own_mib[mark] = {tier: own for tier, (own, _) in memory.items()}
    soak.shared_mib[mark] = {tier: shared for tier, (_, shared) in memory.items()}


def _memory(pid: int) -> tuple[float, float]:
    """MiB of anonymous memory, and of shared memory, that are resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if name in ("RssAnon", "RssShmem")
    }
    return round(kib["RssAnon"] / 1024, 2), round(kib["RssShmem"] / 1024, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument(
        "--marks", type=int, nargs="*", default=[2000], help="requests after which to measure"
    )
    parser.add_argument("--json", type=Path, help="where the result goes; default: stdout")
    arguments = parser.parse_args()
    soak = measure(arguments.requests, arguments.concurrency, arguments.marks)
    text = json.dumps({"machine": describe_machine(), **asdict(soak)}, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
