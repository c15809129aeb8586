"""Split against monolith under rising request rates, through the same router.

    python benchmarks/serve_rates.py --model benchmarks/models/llama-3.1-8b \
        --device cuda:0 cuda:1 --rates 8 16 24 30 34 --json out.json

split: one prefill and one decode worker, which computes prompts itself when those of the other
would wait for long. monolith: two workers that do all. Decode workers compute prompts in chunks
beside their decode steps, `--chunk` tokens a step at most; give several to find the best. Workers
take the devices in turn: `cuda:0 cuda:1` is a GPU each, `cuda` one for both.

Requests are the first of `--workload` with their own arrivals, sped up to each mean rate, for
`--seconds`; where it has none, they come as a Poisson process. Goodput is the share of requests
within `--ttft-ms` whose own p99 gap between tokens is within each of `--itl-ms`. Weights are random
unless `--load-format auto`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import describe_machine

from splitserve.bench.pacing import open_loop, recorded
from splitserve.bench.record import RequestRecord
from splitserve.bench.replay import replay, warm_up
from splitserve.bench.report import Limits, summarize
from splitserve.bench.targets import SuiteTarget
from splitserve.bench.workload import WorkItem, cap, load_workload
from splitserve.client import AsyncClient
from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig

WORKLOADS = Path(__file__).parent / "workloads"
TIMEOUT_S = 120.0


def suite_config(options: argparse.Namespace, mode: str, chunk: int) -> SuiteConfig:
    worker = ("--max-context-tokens", str(options.max_context_tokens))
    if options.device != ["cpu"]:
        worker += ("--gpu-memory-utilization", str(options.gpu_memory_utilization))
    worker += ("--skip-prefix-cache", *options.worker_flag)
    split = mode == "split"
    return SuiteConfig(
        model=str(options.model),
        load_format=options.load_format,
        devices=tuple(options.device),
        num_prefill=1 if split else 0,
        num_decode=1 if split else 2,
        log_level="warning",
        flags={
            "router": (
                *("--max-context-tokens", str(options.max_context_tokens)),
                *options.router_flag,
            ),
            "prefill": (*worker, *options.prefill_flag),
            "decode": (*worker, "--max-step-tokens", str(chunk)),
        },
    )


async def measure(
    options: argparse.Namespace, target_address: str, rate: float, vocab_size: int
) -> list[RequestRecord]:
    items = requests_of(options, rate)
    own_arrivals = any(item.arrival_s for item in items)
    pacing = recorded(items, 1.0) if own_arrivals else open_loop(len(items), rate, seed=0)
    target = SuiteTarget(AsyncClient(target_address), "", target_address, TIMEOUT_S)
    try:
        await warm_up(target, vocab_size=vocab_size)
        return await replay(items, pacing, target, vocab_size=vocab_size, seed=0)
    finally:
        await target.close()


def requests_of(options: argparse.Namespace, rate: float) -> list[WorkItem]:
    """The first ones of the workload, as many as come in `--seconds` at the mean rate."""
    items = load_workload(WORKLOADS / f"{options.workload}.jsonl")
    items = cap(items, options.max_prompt_tokens, options.max_output_tokens)
    items = items[: max(2, round(rate * options.seconds))]
    arrivals = [item.arrival_s or 0.0 for item in items]
    if not any(arrivals):
        return items
    scale = options.seconds / (arrivals[-1] - arrivals[0])
    return [
        WorkItem(item.id, item.prompt_tokens, item.output_tokens, (at - arrivals[0]) * scale)
        for item, at in zip(items, arrivals, strict=True)
    ]


def rate_row(options: argparse.Namespace, records: list[RequestRecord]) -> dict[str, Any]:
    report = summarize(records, Limits())
    within = {
        f"within_{itl:g}_ms": summarize(records, Limits(options.ttft_ms, itl)).goodput.share
        for itl in options.itl_ms
    }
    return {
        "requests": report.completed,
        "failed": report.failed,
        "errors": report.errors,
        "ttft_ms": asdict(report.ttft_ms) if report.ttft_ms else None,
        "itl_ms": asdict(report.itl_ms) if report.itl_ms else None,
        "output_tokens_per_s": report.output_tokens_per_s,
        **within,
    }


def show(mode: str, rate: float, row: dict[str, Any]) -> None:
    ttft, itl = row["ttft_ms"] or {}, row["itl_ms"] or {}
    within = {key: round(value, 3) for key, value in row.items() if key.startswith("within")}
    parts = [
        f"{d.get('p50', 0):.1f} / {d.get('p90', 0):.1f} / {d.get('p99', 0):.1f}"
        for d in (ttft, itl)
    ]
    print(f"{mode:>14} {rate:5.1f}/s  TTFT {parts[0]}  ITL {parts[1]}  {within}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parser.add_argument("--device", nargs="+", default=["cuda:0", "cuda:1"])
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--max-context-tokens", type=int, default=8192)
    parser.add_argument(
        "--worker-flag", action="append", default=[], help="more flags of both tiers"
    )
    parser.add_argument(
        "--prefill-flag", action="append", default=[], help="more of prefill workers"
    )
    parser.add_argument("--router-flag", action="append", default=[], help="more of the router")
    parser.add_argument("--workload", default="azure-conv")
    parser.add_argument(
        "--modes", nargs="+", choices=("split", "monolith"), default=["split", "monolith"]
    )
    parser.add_argument("--chunk", type=int, nargs="+", default=[512], help="see above")
    parser.add_argument("--rates", type=float, nargs="+", default=[8, 16, 24, 30, 34])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--max-prompt-tokens", type=int)
    parser.add_argument("--max-output-tokens", type=int)
    parser.add_argument("--ttft-ms", type=float, default=500.0)
    parser.add_argument("--itl-ms", type=float, nargs="+", default=[25.0, 12.0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=Path, help="file that a line for each request goes to")
    options = parser.parse_args()

    rows = []
    with StopSignals() as signals:
        for mode in options.modes:
            for chunk in options.chunk:
                with LocalSuite(suite_config(options, mode, chunk), signals) as suite:
                    suite.start()
                    for rate in options.rates:
                        vocab = asyncio.run(vocab_size(suite.target))
                        records = asyncio.run(measure(options, suite.target, rate, vocab))
                        row = rate_row(options, records)
                        rows.append({"mode": mode, "chunk": chunk, "rate": rate, **row})
                        show(f"{mode} {chunk}", rate, row)
                        save(options, rows)
                        if options.records:
                            keep(options.records, mode, chunk, rate, records)


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.json:
        document = {"machine": describe_machine(), "command": " ".join(sys.argv), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def keep(path: Path, mode: str, chunk: int, rate: float, records: list[RequestRecord]) -> None:
    with path.open("a") as file:
        for record in records:
            row = {
                "mode": mode,
                "chunk": chunk,
                "rate": rate,
                "sent_s": round(record.sent_s, 4),
                "prompt_tokens": record.prompt_tokens,
                "ttft_ms": round(record.ttft_s * 1000, 2) if record.token_times_s else None,
                "itl_ms": [round(gap * 1000, 2) for gap in record.itl_s],
                "error": record.error,
            }
            file.write(json.dumps(row) + "\n")


async def vocab_size(address: str) -> int:
    client = AsyncClient(address)
    try:
        return (await client.models())[0].vocab_size
    finally:
        await client.close()


if __name__ == "__main__":
    main()
