"""One model on one GPU: decode steps beside their floor, prefill, and workloads, in one process.

    python benchmarks/engine_rows.py --model benchmarks/models/llama-3.1-8b --batch 1 64 \
        --prefill 64x1024 --workload fixed-128-128 chat --json benchmarks/results/NAME.json

Weights are random, prompts are random tokens, outputs greedy and forced to their length, and
prefixes are not reused.

step: the median gap between tokens with a full batch, every sequence having `--context`
    tokens before the first measured one. Its floor is the bytes of weights and of keys and values
    over the bandwidth of a large copy in the same run. `exposed` is by how much a step of the whole
    loop is longer than the same steps launched back to back with no loop around them (`device`).
    `sampled` are the same three of a step with draws at a temperature of 0.8 from the likeliest
    0.95. With random weights these are nearly the whole vocabulary: the slowest case of sampling,
    where a trained model's are some tens or hundreds of tokens.
prefill: from the first prompt submitted to the last first token, for COUNTxTOKENS prompts at once.
workload: all requests submitted at once, as many in flight as the batch holds.

`--static` adds the workload in padded batches of the same size, one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from benchmarks.kernels.timing import copy_bytes_per_s
from splitserve.bench.engine_replay import EngineReplay
from splitserve.bench.pacing import Pacing
from splitserve.bench.report import Limits, Report, summarize
from splitserve.bench.workload import WorkItem, load_workload
from splitserve.engine.core import CoreConfig
from splitserve.engine.factory import EngineConfig, open_engine
from splitserve.engine.protocol import Draw, Slice
from splitserve.gc_heap import freeze_gc_heap
from splitserve.sampling import SamplingParams
from splitserve.weights.checkpoint import read_config

STEPS = 128
MEASURED = slice(16, 112)
GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)
WORKLOADS = Path(__file__).parent / "workloads"


def at_once(items: list[WorkItem]) -> Pacing:
    return Pacing((0.0,) * len(items), None, "all at once")


def loop_ms(
    bench: EngineReplay, batch: int, context: int, sampling: SamplingParams = GREEDY
) -> float:
    """The median gap between the tokens of the sequence that began last."""
    items = [WorkItem(str(i), context, STEPS) for i in range(batch)]
    records = bench.run(items, at_once(items), seed=batch, sampling=sampling)
    last = max(records, key=lambda record: record.token_times_s[0])
    return statistics.median(last.itl_s[MEASURED]) * 1e3


def slices_at(
    engine: Any, batch: int, context: int, steps: int, sampling: SamplingParams = GREEDY
) -> list[list[Slice]]:
    """Steps of a full batch, each sequence with pages and a seed of its own."""
    width = -(-(context + steps) // engine.spec.block_tokens)
    pages = [list(range(i * width, (i + 1) * width)) for i in range(batch)]
    return [
        [
            Slice([7], context + step, pages[i], [Draw(sampling, i, 0, (), (), step)], i)
            for i in range(batch)
        ]
        for step in range(steps)
    ]


def device_ms(engine: Any, batch: int, context: int, sampling: SamplingParams = GREEDY) -> float:
    """A step among steps that are launched one behind the other."""
    steps = slices_at(engine, batch, context, STEPS, sampling)
    for step in steps[: MEASURED.start]:
        engine.launch(step).tokens()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in steps[MEASURED]:
        last = engine.launch(step)
    last.tokens()
    return (time.perf_counter() - began) / (MEASURED.stop - MEASURED.start) * 1e3


def profile(engine: Any, batch: int, context: int) -> list[dict[str, Any]]:
    """A step's kernels by their time on the device. Where one starts before another has ended,
    both have the time.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    steps = slices_at(engine, batch, context, 4)
    engine.launch(steps[0]).tokens()
    with record(activities=[ProfilerActivity.CUDA]) as profiler:
        for step in steps[1:]:
            engine.launch(step).tokens()
    rows = [
        {
            "kernel": event.key[:70],
            "calls": event.count // 3,
            "ms": round(event.self_device_time_total / 3000, 4),
        }
        for event in profiler.key_averages()
        if event.self_device_time_total
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:12]


def step_row(
    options: argparse.Namespace, engine: Any, bench: EngineReplay, batch: int
) -> dict[str, Any]:
    spec = engine.spec
    kv = batch * (options.context + STEPS / 2) * spec.block_bytes / spec.block_tokens
    floor = (options.weight_bytes + kv) / options.copy_bytes_per_s * 1e3
    step = loop_ms(bench, batch, options.context)
    alone = device_ms(engine, batch, options.context)
    sampled = loop_ms(bench, batch, options.context, SAMPLED)
    sampled_alone = device_ms(engine, batch, options.context, SAMPLED)
    row: dict[str, Any] = {
        "batch": batch,
        "step_ms": step,
        "device_ms": alone,
        "exposed_ms": step - alone,
        "sampled_ms": sampled,
        "sampled_device_ms": sampled_alone,
        "sampled_exposed_ms": sampled - sampled_alone,
        "floor_ms": floor,
        "of_floor": floor / step,
    }
    print("step", {k: round(v, 3) for k, v in row.items()}, flush=True)
    if options.profile:
        row["profile"] = profile(engine, batch, options.context)
        for kernel in row["profile"]:
            print("   ", kernel)
    return row


def prefill_row(bench: EngineReplay, size: str) -> dict[str, Any]:
    count, tokens = map(int, size.split("x"))
    items = [WorkItem(str(i), tokens, 1) for i in range(count)]
    times = []
    for turn in range(3):
        records = bench.run(items, at_once(items), seed=100 + turn)
        times.append(max(r.ended_s for r in records) - min(r.sent_s for r in records))
    row = {"prompts": size, "ms": statistics.median(times[1:]) * 1e3, "first_ms": times[0] * 1e3}
    row["tokens_per_s"] = count * tokens / row["ms"] * 1e3
    print("prefill", row, flush=True)
    return row


def workload_row(options: argparse.Namespace, bench: EngineReplay, name: str) -> dict[str, Any]:
    items = load_workload(WORKLOADS / f"{name}.jsonl")[: options.num_requests]
    report = summarize(bench.run(items, at_once(items), seed=0), Limits())
    row: dict[str, Any] = {"workload": name, **short(report)}
    if options.static:
        padded = summarize(bench.run_padded(items, seed=0), Limits())
        row["static_padded"] = short(padded)
        row["over_static"] = report.output_tokens_per_s / padded.output_tokens_per_s
    print("workload", json.dumps(row), flush=True)
    return row


def short(report: Report) -> dict[str, Any]:
    assert not report.failed, report.errors
    assert report.itl_ms
    return {
        "requests": report.completed,
        "seconds": round(report.duration_s, 2),
        "output_tokens_per_s": round(report.output_tokens_per_s, 1),
        "itl_p50_ms": round(report.itl_ms.p50, 2),
        "itl_p99_ms": round(report.itl_ms.p99, 2),
        "itl_max_ms": round(report.itl_ms.max, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--batch", type=int, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", nargs="*", default=[], metavar="COUNTxTOKENS")
    parser.add_argument("--workload", nargs="*", default=[])
    parser.add_argument("--num-requests", type=int)
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=8192)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    copy = options.copy_bytes_per_s = copy_bytes_per_s()
    began, before = time.perf_counter(), torch.cuda.memory_allocated()
    shape = read_config(options.model)
    engine = open_engine(
        EngineConfig(
            model=options.model,
            load_format="dummy",
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            kv_dtype=options.kv_dtype,
            max_batch=options.max_batch,
            max_step_tokens=options.max_step_tokens,
            max_context_tokens=min(4096, shape.max_context_tokens),
        ),
        show_progress=sys.stderr.isatty(),
    )
    start_s = time.perf_counter() - began
    spec = engine.spec
    # Of the embedding a row is looked up for each token.
    embedding = shape.vocab_size * shape.hidden_size * 2
    pool = spec.num_pages * spec.block_bytes
    options.weight_bytes = torch.cuda.memory_allocated() - before - pool - embedding
    print(
        f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, start-up {start_s:.1f} s, "
        f"{options.weight_bytes / 1e9:.2f} GB of weights to read, {spec.num_pages} pages",
        flush=True,
    )
    core = CoreConfig(
        options.max_batch, options.max_step_tokens, max_queue=1 << 20, reuse_prefixes=False
    )
    bench = EngineReplay(engine, core)
    bench.warm_up()
    freeze_gc_heap()
    document = {
        "machine": describe_machine(),
        "gpu": torch.cuda.get_device_name(),
        "command": " ".join(sys.argv),
        "copy_bytes_per_s": copy,
        "weight_bytes": options.weight_bytes,
        "start_s": start_s,
    }
    measure(options, engine, bench, document)
    bench.close()
    engine.close()


def measure(
    options: argparse.Namespace, engine: Any, bench: EngineReplay, document: dict[str, Any]
) -> None:
    """Each row is in the file as soon as it is there."""
    rows = [
        *(("steps", partial(step_row, options, engine, bench, batch)) for batch in options.batch),
        *(("prefill", partial(prefill_row, bench, size)) for size in options.prefill),
        *(("workloads", partial(workload_row, options, bench, n)) for n in options.workload),
    ]
    for kind, row in rows:
        document.setdefault(kind, []).append(row())
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
