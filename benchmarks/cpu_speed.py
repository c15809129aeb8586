"""splitserve against transformers, and in-flight against static batching, on this CPU.

    python benchmarks/cpu_speed.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --json out.json

Both run bf16 weights of the same checkpoint with torch's own choice of threads. A machine that
others use drifts, so the two sides take turns and each round gives one ratio; medians are
reported with the lowest and the highest round. Absolute figures of one machine mean little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from splitserve import LLM, Client, SamplingParams
from splitserve.launcher.config import SuiteConfig
from splitserve.launcher.signals import StopSignals
from splitserve.launcher.suite import LocalSuite

SEED = 7
VOCAB = 40000
PROMPT_TOKENS, OUTPUT_TOKENS, CONCURRENCY, LONG_PROMPT = 32, 128, 16, 512

Measure = Callable[[], float]
"""Runs once and returns tokens a second."""


@dataclass(frozen=True)
class Row:
    """One comparison. `target` is the ratio it should reach."""

    name: str
    ours_tokens_per_s: float
    theirs_tokens_per_s: float
    ratio_median: float
    ratio_low: float
    ratio_high: float
    target: float


def compare(name: str, target: float, ours: Measure, theirs: Measure, rounds: int) -> Row:
    """Warm up both, then let them take turns."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratios = [mine / other for mine, other in pairs]
    row = Row(
        name,
        statistics.median(mine for mine, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        target,
    )
    print(
        f"{row.name:44} {row.ours_tokens_per_s:8.1f} {row.theirs_tokens_per_s:8.1f} "
        f"{row.ratio_median:6.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f}) target {target}",
        flush=True,
    )
    return row


def prompt(length: int) -> list[int]:
    """Fresh random tokens, so that nothing is served from a cache."""
    return [random.randrange(VOCAB) for _ in range(length)]


def timed(tokens: int, run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return tokens / (time.perf_counter() - began)


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def through_services(client: Client, threads: ThreadPoolExecutor, requests: int) -> Measure:
    def run() -> None:
        prompts = [prompt(PROMPT_TOKENS) for _ in range(requests)]
        list(threads.map(lambda p: client.generate(p, greedy(OUTPUT_TOKENS)), prompts))

    return lambda: timed(requests * OUTPUT_TOKENS, run)


class Monolith:
    """An `LLM` in a process of its own, as its peer has one: two engines in one process would
    share OpenMP's threads, and the second would be slowed.
    """

    def __init__(self, model: Path) -> None:
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _open_llm, (str(model),)
        )

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        """Complete all prompts in one in-flight batch."""
        self._process.submit(_generate, prompts, params).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


_LLM: list[LLM] = []
"""The one engine of a `Monolith`'s process."""


def _open_llm(model: str) -> None:
    _LLM.append(LLM(model, reuse_prefixes=False, max_batch=CONCURRENCY))


def _generate(prompts: list[list[int]], params: list[SamplingParams]) -> None:
    _LLM[0].generate(prompts, params)


def prefill_alone(llm: Monolith, length: int) -> Measure:
    return lambda: timed(length, lambda: llm.generate([prompt(length)], [greedy(1)]))


def by_transformers(model: Any, requests: int, length: int, count: int) -> Measure:
    """One static batch of equal lengths: nothing is padded, which is its best case."""

    @torch.inference_mode()
    def run() -> None:
        ids = torch.tensor([prompt(length) for _ in range(requests)])
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    return lambda: timed(requests * (count if count > 1 else length), run)


def heavy_tailed(path: Path, count: int) -> list[tuple[int, int]]:
    """(prompt, output) lengths of the chat workload, an eighth of their size."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [(max(1, r["prompt_tokens"] // 8), max(1, r["output_tokens"] // 8)) for r in lines]


def in_flight(llm: Monolith, lengths: list[tuple[int, int]]) -> Measure:
    def run() -> None:
        llm.generate([prompt(p) for p, _ in lengths], [greedy(o) for _, o in lengths])

    return lambda: timed(sum(o for _, o in lengths), run)


def static_padded(llm: Monolith, lengths: list[tuple[int, int]]) -> Measure:
    """Batches in order of arrival; all of a batch is as long as its longest."""

    def run() -> None:
        for start in range(0, len(lengths), CONCURRENCY):
            batch = lengths[start : start + CONCURRENCY]
            longest, most = max(p for p, _ in batch), max(o for _, o in batch)
            llm.generate([prompt(longest) for _ in batch], [greedy(most)] * len(batch))

    return lambda: timed(sum(o for _, o in lengths), run)


@contextmanager
def running_suite(model: Path, log_dir: Path) -> Iterator[Client]:
    log_dir.mkdir(parents=True, exist_ok=True)
    config = SuiteConfig(model=str(model))
    with StopSignals() as signals, LocalSuite(config, signals, log_dir) as suite:
        suite.start()
        with Client(suite.target) as client:
            yield client


def load_transformers(path: Path) -> Any:
    """Dense bf16 weights, which transformers is faster with here than with packed ones."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).eval()


def measure(model: Path, workload: Path, rounds: int) -> list[Row]:
    rows = []
    theirs = load_transformers(model)
    with (
        running_suite(model, Path(".cache/benchmark")) as client,
        ThreadPoolExecutor(CONCURRENCY) as threads,
    ):
        for requests, target in ((1, 1.5), (CONCURRENCY, 1.5)):
            rows.append(
                compare(
                    f"four services, {requests} at once, / transformers",
                    target,
                    through_services(client, threads, requests),
                    by_transformers(theirs, requests, PROMPT_TOKENS, OUTPUT_TOKENS),
                    rounds,
                )
            )
    with closing(Monolith(model)) as llm:
        ours = prefill_alone(llm, LONG_PROMPT)
        other = by_transformers(theirs, 1, LONG_PROMPT, 1)
        rows.append(
            compare(f"prefill of {LONG_PROMPT} tokens / transformers", 1.0, ours, other, rounds)
        )
        del theirs, other
        lengths = heavy_tailed(workload, 64)
        ours, static = in_flight(llm, lengths), static_padded(llm, lengths)
        rows.append(compare("in-flight / static padded, chat lengths", 2.0, ours, static, rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", type=Path, default=Path("benchmarks/workloads/chat.jsonl"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(SEED)
    print(f"{'tokens/s':44} {'ours':>8} {'theirs':>8}  ratio")
    rows = measure(args.model, args.workload, args.rounds)
    if args.json:
        report = {
            "command": " ".join(sys.argv),
            **describe_machine(),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
