"""How fast KV blocks go from one worker to another through the store.

    python benchmarks/handoff.py [--blocks 32] [--block-bytes 737280] [--rounds 9]
    python benchmarks/handoff.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf --json out.json
    python benchmarks/handoff.py --device cuda --gpus 0,1 --load-format dummy \\
        --model benchmarks/models/llama-3.1-8b --transport device

With a model it hands prompts over between two workers, see `handoff_workers`. Without one it
starts a store process and two clients of it. One round reserves, writes, digests and commits all
blocks on one client, and awaits, copies and verifies them on the other, the way a prefill and a
decode worker do. Prints one JSON object: for each transport the median GB/s of the whole and its
parts, where a byte that went all the way counts once. `memcpy` is what this machine copies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path

import handoff_workers
import numpy as np

from splitserve.kv.client import KvStoreClient
from splitserve.kv.codec import block_digest
from splitserve.kv.layout import BlockSpec, KvLayout, ReadableBlock
from splitserve.kv.runs import TransportChoice

BLOCK_TOKENS = 16
TRANSPORTS: Sequence[TransportChoice] = ("shm", "grpc")


@contextmanager
def store_process(arena_bytes: int) -> Iterator[str]:
    """Runs a store and yields its address."""
    flags = ["--port", "0", "--metrics-port", "0", "--arena-bytes", str(arena_bytes)]
    process = subprocess.Popen(
        [sys.executable, "-m", "services.kvstore", *flags], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"listening on ([\d.]+:\d+)", line):
                yield found[1]
                return
        raise RuntimeError("the store did not start")
    finally:
        process.terminate()
        process.communicate(timeout=10)


async def one_round(
    writer: KvStoreClient, reader: KvStoreClient, content: list[memoryview], out: list[memoryview]
) -> dict[str, float]:
    """Seconds of one handover of all of `content`, and of its parts."""
    layout = writer.layout
    keys = [os.urandom(32) for _ in content]
    lease = await writer.grant_lease("benchmark", 30_000)
    started = time.perf_counter()

    specs = [BlockSpec(key, layout.block_bytes, BLOCK_TOKENS) for key in keys]
    reservations = await writer.reserve(lease, specs)
    await asyncio.gather(
        *(
            writer.write(lease, key, reservation, 0, data)
            for key, reservation, data in zip(keys, reservations, content, strict=True)
        )
    )
    written = time.perf_counter()
    digests = await asyncio.gather(
        *(writer.digest(key, BLOCK_TOKENS, data) for key, data in zip(keys, content, strict=True))
    )
    await writer.commit(lease, zip(keys, digests, strict=True))
    committed = time.perf_counter()

    ready: list[ReadableBlock] = []
    async with aclosing(reader.await_blocks(lease, keys, wait_for_writer=True)) as batches:
        async for some, _ in batches:
            ready += some
    await asyncio.gather(
        *(reader.read(lease, block, room) for block, room in zip(ready, out, strict=True))
    )
    ended = time.perf_counter()
    await writer.release([lease])
    return {
        "whole": ended - started,
        "reserve_write": written - started,
        "digest_commit": committed - written,
        "await_read_verify": ended - committed,
    }


async def measure(
    address: str, transport: TransportChoice, layout: KvLayout, blocks: int, rounds: int
) -> dict[str, float]:
    """Median GB/s of each part over `rounds`, after one round that is not counted."""
    content = [memoryview(bytearray(os.urandom(layout.block_bytes))) for _ in range(blocks)]
    out = [memoryview(bytearray(layout.block_bytes)) for _ in range(blocks)]
    writer, reader = [
        await KvStoreClient.connect(address, worker_id=name, layout=layout, transport=transport)
        for name in ("writer", "reader")
    ]
    try:
        samples = [await one_round(writer, reader, content, out) for _ in range(rounds + 1)][1:]
    finally:
        await writer.close()
        await reader.close()
    total = blocks * layout.block_bytes / 1e9
    return {
        part: round(total / statistics.median(sample[part] for sample in samples), 3)
        for part in samples[0]
    }


def bare(layout: KvLayout, rounds: int) -> dict[str, float]:
    """GB/s of one plain copy and one digest of a block, in one thread."""
    source = np.frombuffer(os.urandom(layout.block_bytes), dtype=np.uint8)
    target = np.empty_like(source)

    def rate(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20 * rounds):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return round(layout.block_bytes / statistics.median(times) / 1e9, 3)

    return {
        "memcpy": rate(lambda: np.copyto(target, source)),
        "digest": rate(lambda: block_digest(b"k" * 32, 16, layout.fingerprint, source.data)),
    }


def store_only(args: argparse.Namespace) -> dict[str, object]:
    """The rounds between two clients of a store."""
    layout = KvLayout(b"m" * 32, BLOCK_TOKENS, args.block_bytes)
    with store_process(2 * args.blocks * (args.block_bytes + 4096)) as address:
        results: dict[str, object] = {
            transport: asyncio.run(measure(address, transport, layout, args.blocks, args.rounds))
            for transport in TRANSPORTS
        }
    return {
        "blocks": args.blocks,
        "block_bytes": args.block_bytes,
        "rounds": args.rounds,
        "cpus": os.cpu_count(),
        "unit": "GB/s",
        **dict(results),
        "one_thread": bare(layout, args.rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--block-bytes", type=int, default=737_280)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the report there, too")
    handoff_workers.add_arguments(parser)
    args = parser.parse_args()
    report = handoff_workers.run(args) if args.model else store_only(args)
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
