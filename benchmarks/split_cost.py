"""What the split costs and what it buys, against the monolith on the same cores.

    python benchmarks/split_cost.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --json out.json

Time to first token: one 512-token prompt at a time, the two sides taking turns; also straight to
the prefill worker, so that the difference is what the router adds. Inter-token latency: clients
stream while others keep sending long prompts that ask for one token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from machine import describe_machine

from splitserve import LLM, Client, SamplingParams
from splitserve.engine.threads import yield_cores_when_waiting
from splitserve.launcher.config import SuiteConfig
from splitserve.launcher.signals import StopSignals
from splitserve.launcher.suite import LocalSuite
from splitserve.outputs import OutputDelta
from splitserve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

SEED, VOCAB = 11, 40000
PROMPT_TOKENS = 512
STREAMS, STREAM_PROMPT, STREAM_TOKENS = 4, 32, 128
LONG_CLIENTS, LONG_PROMPT = 2, 1024

Stream = Callable[[list[int], SamplingParams], Iterator[OutputDelta]]
"""How a prompt is streamed: `LLM.stream` and `Client.stream` alike."""


def prompt(length: int) -> list[int]:
    """Fresh random tokens, so that nothing is served from a cache."""
    return [random.randrange(VOCAB) for _ in range(length)]


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def first_token_ms(stream: Stream) -> float:
    """Milliseconds from the call to the first token of a fresh prompt."""
    began = time.perf_counter()
    deltas = stream(prompt(PROMPT_TOKENS), greedy(4))
    next(deltas)
    elapsed = time.perf_counter() - began
    for _ in deltas:
        pass
    return elapsed * 1e3


def prefill_alone_ms(stub: Any) -> float:
    """The same prompt straight to the prefill worker, nothing handed over."""
    request = prefill_pb2.PrefillRequest(
        request_id=f"bench-{random.getrandbits(64):x}",
        prompt_token_ids=prompt(PROMPT_TOKENS),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=4, seed=1, n=1),
    )
    began = time.perf_counter()
    stub.Prefill(request, timeout=60)
    return (time.perf_counter() - began) * 1e3


def token_gaps_ms(stream: Stream) -> list[float]:
    """Gaps between messages of `STREAMS` clients while others send long prompts."""
    done = threading.Event()

    def disturb() -> int:
        sent = 0
        while not done.is_set():
            for _ in stream(prompt(LONG_PROMPT), greedy(1)):
                pass
            sent += 1
        return sent

    def listen() -> list[float]:
        times = [time.perf_counter() for _ in stream(prompt(STREAM_PROMPT), greedy(STREAM_TOKENS))]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]

    with ThreadPoolExecutor(STREAMS + LONG_CLIENTS) as threads:
        others = [threads.submit(disturb) for _ in range(LONG_CLIENTS)]
        try:
            listeners = [threads.submit(listen) for _ in range(STREAMS)]
            gaps = [gap for each in listeners for gap in each.result()]
        finally:
            done.set()
        sent = sum(each.result() for each in others)
    print(f"  {sent} long prompts were answered meanwhile", flush=True)
    return gaps


def summary(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 90, 99)}


def measure_first_token(llm: LLM, client: Client, stub: Any, rounds: int) -> dict[str, Any]:
    sides = {
        "monolith": lambda: first_token_ms(llm.stream),
        "split": lambda: first_token_ms(client.stream),
        "prefill worker alone": lambda: prefill_alone_ms(stub),
    }
    for side in sides.values():
        side()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            samples[name].append(side())
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "ttft_ms": {name: summary(values) for name, values in samples.items()},
        "split_minus_monolith_p50_ms": round(medians["split"] - medians["monolith"], 2),
        "router_adds_p50_ms": round(medians["split"] - medians["prefill worker alone"], 2),
    }


@contextmanager
def running_suite(model: Path, worker_flags: dict[str, tuple[str, ...]]) -> Iterator[LocalSuite]:
    log_dir = Path(".cache/benchmark")
    log_dir.mkdir(parents=True, exist_ok=True)
    config = SuiteConfig(model=str(model), flags=worker_flags)
    with StopSignals() as signals, LocalSuite(config, signals, log_dir) as suite:
        suite.start()
        yield suite


def prefill_stub(suite: LocalSuite) -> Any:
    stub: Any = prefill_pb2_grpc.PrefillServiceStub
    return stub(grpc.insecure_channel(suite.address_of("prefill")))


def measure(model: Path, rounds: int, nice: int) -> dict[str, Any]:
    flags = {"prefill": ("--nice", str(nice))}
    with running_suite(model, flags) as suite, Client(suite.target) as client:
        with LLM(str(model)) as llm:
            report = measure_first_token(llm, client, prefill_stub(suite), rounds)
        gaps: dict[str, list[float]] = {"split": [], "monolith": []}
        for _ in range(max(1, rounds // 10)):
            gaps["split"] += token_gaps_ms(client.stream)
            with LLM(str(model)) as llm:
                gaps["monolith"] += token_gaps_ms(llm.stream)
    report["inter_token_ms_beside_long_prompts"] = {k: summary(v) for k, v in gaps.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prefill-nice", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(SEED)
    yield_cores_when_waiting()
    report = measure(args.model, args.rounds, args.prefill_nice)
    report = {"command": " ".join(sys.argv), **describe_machine(), **report}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
