"""`splitserve bench`: replays a workload and measures."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm

from splitserve.bench.pacing import DEFAULT_CONCURRENCY, Pacing, choose
from splitserve.bench.replay import replay, warm_up
from splitserve.bench.report import Limits, Report, render, summarize
from splitserve.bench.targets import SuiteTarget, Target, TargetInfo
from splitserve.bench.workload import WorkItem, cap, check_context, load_workload, select
from splitserve.cli.options import (
    add_client_flags,
    add_precision_flags,
    api_key,
    check_target,
    positive,
    positive_float,
    precision,
    tls_config,
)
from splitserve.client import AsyncClient
from splitserve.engine.factory import EngineConfig, open_engine, step_sizes
from splitserve.engine.scheduler import check_step
from splitserve.errors import ConfigError
from splitserve.gc_heap import freeze_gc_heap
from splitserve.weights.checkpoint import read_config

EXIT_FAILED_REQUESTS = 1
EPILOG = """
Inter-token latency has one sample a message, as in vLLM's benchmark; time per output token does
not depend on how tokens are put into messages. A request is good if its TTFT and its own p99
inter-token latency are within the limits. Exit status 1 if a request failed.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="replay a workload and measure",
        description="Replay a workload file against a running suite or an engine in this process.",
        epilog=EPILOG,
    )
    parser.add_argument("--workload", required=True, type=Path, metavar="FILE.jsonl")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--target", metavar="HOST:PORT", help="router of a running suite")
    where.add_argument("--engine", action="store_true", help="an engine here; needs --model")
    parser.add_argument("--model", metavar="PATH", help="with --engine: the checkpoint")
    parser.add_argument("--model-name", default="", help="with --target: which model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    _add_load_flags(parser)
    _add_engine_flags(parser)
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table; see the module for the exit status."""
    sizes = step_sizes(options.device)
    options.max_batch = options.max_batch or sizes.max_batch
    options.max_step_tokens = options.max_step_tokens or sizes.max_step_tokens
    check_step(options.max_batch, options.max_step_tokens, EngineConfig.block_tokens)
    items = select(load_workload(options.workload), options.num_requests)
    items = cap(items, options.max_prompt_tokens, options.max_output_tokens)
    pacing = choose(
        items,
        rate=options.rate,
        concurrency=options.concurrency,
        time_scale=options.time_scale,
        seed=options.seed,
        default_concurrency=options.max_batch if options.engine else DEFAULT_CONCURRENCY,
    )
    if options.engine:
        info, report = _measure_engine(options, items, pacing)
    else:
        info, report = asyncio.run(_measure(options, items, pacing))
    print(f"target              {info.description}")
    print(f"workload            {options.workload.name}, {len(items)} requests")
    print(f"pacing              {_batching(options, pacing)}")
    print(render(report))
    if options.json:
        _write_json(options, info, pacing, report)
    return EXIT_FAILED_REQUESTS if report.failed else 0


def _batching(options: argparse.Namespace, pacing: Pacing) -> str:
    if options.static_batches:
        return f"static batches of {options.max_batch}, padded to their longest"
    return pacing.description


async def _measure(
    options: argparse.Namespace, items: list[WorkItem], pacing: Pacing
) -> tuple[TargetInfo, Report]:
    target = _suite_target(options)
    try:
        info = await target.info()
        check_context(items, info.max_context_tokens)
        await warm_up(target, vocab_size=info.vocab_size)
        with tqdm(total=len(items), unit="request", disable=None) as bar:
            records = await replay(
                items,
                pacing,
                target,
                vocab_size=info.vocab_size,
                seed=options.seed,
                on_done=lambda record: bar.update(),
            )
    finally:
        await target.close()
    return info, summarize(records, Limits(options.ttft_ms, options.itl_ms))


def _suite_target(options: argparse.Namespace) -> Target:
    check_target(options.target)
    client = AsyncClient(options.target, api_key=api_key(options), tls=tls_config(options))
    return SuiteTarget(client, options.model_name, options.target, options.timeout)


def _measure_engine(
    options: argparse.Namespace, items: list[WorkItem], pacing: Pacing
) -> tuple[TargetInfo, Report]:
    if not options.model:
        raise ConfigError("--engine needs --model PATH")
    # Here and not above: a bench of a running suite needs no engine.
    from splitserve.bench.engine_replay import EngineReplay
    from splitserve.engine.core import CoreConfig

    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        dtype=options.dtype,
        device=options.device,
        deterministic=options.deterministic,
        threads=options.threads,
        max_batch=options.max_batch,
        max_step_tokens=options.max_step_tokens,
        max_context_tokens=_context(options.model, items),
        **precision(options),
    )
    engine = open_engine(config, show_progress=sys.stderr.isatty())
    core = CoreConfig(
        options.max_batch, options.max_step_tokens, max_queue=sys.maxsize, reuse_prefixes=False
    )
    bench = EngineReplay(engine, core)
    spec = engine.spec
    info = TargetInfo(f"{options.model} in this process", spec.vocab_size, spec.max_context_tokens)
    try:
        bench.warm_up()
        freeze_gc_heap()
        with tqdm(total=len(items), unit="request", disable=None) as bar:
            if options.static_batches:
                records = bench.run_padded(items, seed=options.seed)
            else:
                records = bench.run(
                    items, pacing, seed=options.seed, on_done=lambda record: bar.update()
                )
    finally:
        bench.close()
        engine.close()
    return info, summarize(records, Limits(options.ttft_ms, options.itl_ms))


def _context(model: str, items: list[WorkItem]) -> int:
    """Raises ConfigError if a request cannot fit the model's context."""
    context = read_config(model).max_context_tokens
    check_context(items, context)
    return context


def _write_json(
    options: argparse.Namespace, info: TargetInfo, pacing: Pacing, report: Report
) -> None:
    document = {
        "target": dataclasses.asdict(info),
        "workload": options.workload.name,
        "pacing": _batching(options, pacing),
        "seed": options.seed,
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_output_tokens": options.max_output_tokens,
        **dataclasses.asdict(report),
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--num-requests", type=positive, metavar="N", help="default: all")
    pace = group.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=positive_float, metavar="R", help="Poisson, requests a second")
    pace.add_argument("--concurrency", type=positive, metavar="C", help="requests in flight")
    pace.add_argument(
        "--time-scale", type=positive_float, metavar="F", help="recorded arrivals times F"
    )
    group.add_argument("--max-prompt-tokens", type=positive, metavar="N", help="cut longer prompts")
    group.add_argument("--max-output-tokens", type=positive, metavar="N", help="cut longer outputs")
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals")
    group.add_argument("--ttft-ms", type=positive_float, metavar="X", help="limit for goodput")
    group.add_argument("--itl-ms", type=positive_float, metavar="Y", help="limit for goodput")
    group.description = (
        "Without --rate, --concurrency and --time-scale: as recorded, or else "
        f"{DEFAULT_CONCURRENCY} in flight, with --engine as many as its batch holds."
    )


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --engine")
    group.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights of the shape that config.json says",
    )
    group.add_argument(
        "--static-batches",
        action="store_true",
        help="the baseline: batches of --max-batch, padded, one after the other",
    )
    group.add_argument("--dtype", default="auto")
    group.add_argument("--device", default="cpu")
    add_precision_flags(group)
    group.add_argument("--deterministic", action="store_true")
    group.add_argument("--threads", type=int, default=0, metavar="N")
    group.add_argument("--max-batch", type=positive, metavar="N", help="default: 64, on a GPU 256")
    group.add_argument(
        "--max-step-tokens", type=positive, metavar="N", help="default: 512, on a GPU 8192"
    )
