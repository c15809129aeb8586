"""How long a prompt's way from a prefill worker to a decode worker takes, on one node.

Starts a store and both workers as processes and plays the router's part: one prompt at a time, or
beside `--streams` others that decode. Times are those of the workers' own spans, which share the
node's clock:

* `to_loaded`: from the end of the prefill until the decode worker has the last block, verified;
* `to_first_step`: until its first step over the prompt begins: that step's end less its length,
  for which the median gap between tokens stands;
* `transfer`: from the first layers that were there until the decode worker has the last block;
* `not_hidden`: `to_loaded` over `transfer`, the part that the prefill did not hide;
* `write_busy`, `read_busy`: how long blocks were copied, digested and committed;
* `first_gap`: from the first token to the second where the router gets them, over the median gap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from machine import describe_machine

from splitserve.kv.control import StoreControl
from splitserve.kv.lease_keeper import LeaseKeeper
from splitserve.obs import names
from splitserve.obs.collector import CollectedSpan, Collector
from splitserve.rpc.channel import open_channel
from splitserve.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

START_S = 600.0
ROUND_S = 120.0
VOCABULARY = 900
_SPANS = {("prefill", names.SPAN_PREFILL), ("prefill", names.SPAN_KV_WRITE)} | {
    ("decode", names.SPAN_KV_READ),
    ("decode", names.SPAN_DECODE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run with workers needs."""
    workers = parser.add_argument_group("with two workers")
    workers.add_argument("--model", default="", help="checkpoint, or a directory with config.json")
    workers.add_argument("--engine", default="torch", choices=["torch", "fake"])
    workers.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    workers.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    workers.add_argument("--dtype", default="auto")
    workers.add_argument("--transport", default="auto", choices=["auto", "device", "shm", "grpc"])
    workers.add_argument("--gpus", default="0", help="GPU of prefill and of decode, as 0 or 0,1")
    workers.add_argument("--pool-bytes", type=int, default=0, help="of each; 0: 4 GiB on a GPU")
    workers.add_argument("--arena-bytes", type=int, default=1 << 30)
    workers.add_argument("--prompt-tokens", type=int, default=1024)
    workers.add_argument("--output-tokens", type=int, default=32)
    workers.add_argument("--max-step-tokens", type=int, default=2048)
    workers.add_argument("--max-batch", type=int, default=16)
    workers.add_argument("--streams", type=int, default=0, help="others that decode meanwhile")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measures `--rounds` prompts after two that are not counted."""
    return asyncio.run(_run(args))


@dataclass
class _Round:
    """One prompt, as the router saw it. Times in seconds."""

    request_id: str
    arrivals: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class _Router:
    """The router's part: a lease, a prefill and a stream for each request."""

    def __init__(
        self,
        args: argparse.Namespace,
        leases: LeaseKeeper,
        prefill: grpc.aio.Channel,
        decode: grpc.aio.Channel,
    ) -> None:
        self._args = args
        self._leases = leases
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(prefill)  # type: ignore[no-untyped-call]
        self._attach: Any = decode_pb2_grpc.DecodeServiceStub(decode).Attach()  # type: ignore[no-untyped-call]
        self._rounds: dict[str, _Round] = {}
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Ends the stream."""
        self._attach.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def request(self, prompt_tokens: int, output_tokens: int) -> _Round:
        """One request of random tokens, from its lease to its last token."""
        one = _Round(f"handoff-{random.getrandbits(48):012x}")
        self._rounds[one.request_id] = one
        prompt = [random.randrange(VOCABULARY) for _ in range(prompt_tokens)]
        sampling = common_pb2.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, n=1, seed=1, ignore_eos=True
        )
        lease = await self._leases.grant()
        try:
            submit = decode_pb2.Submit(
                request_id=one.request_id,
                prompt_token_ids=prompt,
                sampling=sampling,
                lease=lease.to_proto(),
            )
            await self._attach.write(decode_pb2.AttachRequest(submit=submit))
            answer = await self._prefill.Prefill(
                prefill_pb2.PrefillRequest(
                    request_id=one.request_id,
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    lease=lease.to_proto(),
                ),
                timeout=ROUND_S,
                metadata=(("traceparent", f"00-{_trace_id(one)}-{'b7ad6b7169203331'}-01"),),
            )
            one.arrivals.append(time.perf_counter())
            start = decode_pb2.Start(
                request_id=one.request_id,
                first_token_ids=[answer.first_tokens[0].token.id],
                kv_receipt=answer.kv_receipt if answer.HasField("kv_receipt") else None,
            )
            await self._attach.write(decode_pb2.AttachRequest(start=start))
            async with asyncio.timeout(ROUND_S):
                await one.ended.wait()
        finally:
            self._leases.release(lease)
        if one.error:
            raise RuntimeError(one.error)
        return one

    async def _read(self) -> None:
        async for message in self._attach:
            now = time.perf_counter()
            for delta in message.deltas:
                one = self._rounds[delta.request_id]
                one.arrivals += [now] * len(delta.tokens)
                one.cached_tokens = max(one.cached_tokens, delta.cached_tokens)
                one.error = delta.error.message if delta.HasField("error") else ""
                if delta.finish_reason or one.error:
                    one.ended.set()


async def _run(args: argparse.Namespace) -> dict[str, object]:
    collector = Collector()
    async with AsyncExitStack() as stack:
        stack.callback(collector.stop)
        router = await _assemble(args, collector, stack)
        others = [asyncio.create_task(_stream(router, args)) for _ in range(args.streams)]
        try:
            for _ in range(2):
                await router.request(args.prompt_tokens, args.output_tokens)
            rounds = [
                await router.request(args.prompt_tokens, args.output_tokens)
                for _ in range(args.rounds)
            ]
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        measured = [await asyncio.to_thread(_measured, one, collector) for one in rounds]
    keys = [key for key, value in measured[0].items() if isinstance(value, float)]
    return {
        "model": args.model,
        "device": args.device,
        "gpus": args.gpus if args.device == "cuda" else "",
        "transport": sorted({str(one["transport"]) for one in measured}),
        "prompt_tokens": args.prompt_tokens,
        "blocks": measured[0]["blocks"],
        "bytes": measured[0]["bytes"],
        "streams": args.streams,
        "rounds": args.rounds,
        "all_blocks_used": all(one.cached_tokens == args.prompt_tokens for one in rounds),
        "median": {key: round(statistics.median(_of(measured, key)), 3) for key in keys},
        "worst": {key: round(max(_of(measured, key)), 3) for key in keys},
        "machine": describe_machine() | _gpu_name(args),
    }


async def _stream(router: _Router, args: argparse.Namespace) -> None:
    """Decodes short prompts for as long as others are measured."""
    while True:
        await router.request(64, 512)


def _measured(one: _Round, collector: Collector) -> dict[str, object]:
    """One round in milliseconds."""

    def of_round(spans: Sequence[CollectedSpan]) -> dict[tuple[str, str], CollectedSpan]:
        return {
            (span.service, span.name): span
            for span in spans
            if span.attributes.get(names.REQUEST_ID) == one.request_id
        }

    collector.wait_for(lambda spans: of_round(spans).keys() >= _SPANS, timeout_s=30.0)
    found = of_round(collector.spans())
    prefill, write = found["prefill", names.SPAN_PREFILL], found["prefill", names.SPAN_KV_WRITE]
    read, decode = found["decode", names.SPAN_KV_READ], found["decode", names.SPAN_DECODE]
    gaps = [(after - before) * 1e3 for before, after in pairwise(one.arrivals)]
    median_gap = statistics.median(gaps[1:])
    second_token = next(e.time_ns for e in decode.events if e.name == names.EVENT_FIRST_TOKEN)
    to_loaded = (read.end_ns - prefill.end_ns) / 1e6
    first = next(e.time_ns for e in write.events if e.name == names.EVENT_FIRST_LAYERS)
    transfer = (read.end_ns - first) / 1e6
    return {
        "transport": read.attributes[names.KV_TRANSPORT],
        "blocks": read.attributes[names.KV_BLOCKS],
        "bytes": read.attributes[names.KV_BYTES],
        "prefill_ms": prefill.duration_ms,
        "to_loaded_ms": to_loaded,
        "to_first_step_ms": (second_token - prefill.end_ns) / 1e6 - median_gap,
        "transfer_ms": transfer,
        "write_busy_ms": _number(write, names.KV_BUSY_MS),
        "read_busy_ms": _number(read, names.KV_BUSY_MS),
        "not_hidden": max(0.0, to_loaded) / transfer,
        "gap_ms": median_gap,
        "first_gap": gaps[0] / median_gap,
    }


def _number(span: CollectedSpan, name: str) -> float:
    value = span.attributes[name]
    assert isinstance(value, int | float)
    return float(value)


def _of(measured: Sequence[dict[str, object]], key: str) -> list[float]:
    return [value for one in measured if isinstance(value := one[key], float)]


def _trace_id(one: _Round) -> str:
    return one.request_id.removeprefix("handoff-").rjust(32, "0")


async def _assemble(
    args: argparse.Namespace, collector: Collector, stack: AsyncExitStack
) -> _Router:
    own = ("--port", "0", "--metrics-port", "0")
    arena = ("--arena-bytes", str(args.arena_bytes))
    store = await stack.enter_async_context(_process("kvstore", (*own, *arena), {}))
    pool_bytes = args.pool_bytes or (4 << 30 if args.device == "cuda" else 1 << 30)
    flags = (
        *own,
        *(
            "--engine",
            args.engine,
            "--model",
            args.model,
            "--device",
            args.device,
            "--load-format",
            args.load_format,
        ),
        *("--dtype", args.dtype, "--kvstore", store, "--transport", args.transport),
        *("--pool-bytes", str(pool_bytes), "--max-step-tokens", str(args.max_step_tokens)),
        *("--max-batch", str(args.max_batch)),
        *("--otlp-endpoint", collector.endpoint, "--skip-prefix-cache"),
        *(("--fake-step-ms", "5") if args.engine == "fake" else ()),
    )
    gpus = args.gpus.split(",")
    channels = []
    for tier, gpu in (("prefill", gpus[0]), ("decode", gpus[-1])):
        environment = {"CUDA_VISIBLE_DEVICES": gpu} if args.device == "cuda" else {}
        address = await stack.enter_async_context(_process(tier, flags, environment))
        channel = open_channel(address)
        stack.push_async_callback(channel.close, None)
        await _ready(channel)
        channels.append(channel)
    control = StoreControl(store)
    stack.push_async_callback(control.close)
    leases = LeaseKeeper(control, "handoff")
    leases.start()
    stack.push_async_callback(leases.close)
    router = _Router(args, leases, *channels)
    stack.push_async_callback(router.close)
    return router


@asynccontextmanager
async def _process(
    tier: str, flags: Sequence[str], environment: dict[str, str]
) -> AsyncIterator[str]:
    """Runs a service; yields its address once it listens."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{tier}", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    lines: list[str] = []
    copying: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(START_S):
            port = None
            while port is None:
                line = (await process.stdout.readline()).decode()
                if not line:
                    raise RuntimeError(f"{tier} did not start: {''.join(lines)}")
                lines.append(line)
                port = _port_in(line)
        copying = asyncio.create_task(_copy(process.stdout))
        yield f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if copying is not None:
            await copying


def _port_in(line: str) -> int | None:
    """Of a worker's announcement, or of the store's log."""
    if found := re.search(r"listening on [\d.]+:(\d+)", line):
        return int(found[1])
    return int(json.loads(line)["port"]) if line.startswith('{"event": "ready"') else None


async def _copy(output: asyncio.StreamReader) -> None:
    """Shows what a service says."""
    async for line in output:
        sys.stderr.write(line.decode())


async def _ready(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service="readiness")
    async with asyncio.timeout(START_S):
        while (await stub.Check(request)).status != health_pb2.HealthCheckResponse.SERVING:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _gpu_name(args: argparse.Namespace) -> dict[str, object]:
    if args.device != "cuda":
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(0), "gpus_seen": torch.cuda.device_count()}
