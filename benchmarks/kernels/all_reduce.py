"""Small sums between the GPUs of this node: NCCL, torch's one-shot, ours, and ours with the norm.

    PYTHONPATH=kernels:. python benchmarks/kernels/all_reduce.py --ranks 2 --json out.json

A process a GPU. Each size is that of rows of bf16 as wide as a model of 8B parameters is. First
every way is compared with the plain torch reference on fresh inputs; then each is timed as the
median of replays of a CUDA graph of many calls (`us`), and of the same calls one behind the other
from the host (`eager_us`), of which the slowest rank's counts. Steps over several GPUs are not
recorded as graphs today: the second figure is what they have. All ranks call alike often: a rank
that calls once more waits for ever.

"torch + norm" and "nccl + norm" are the sum, then `add_norm` in a launch of its own: what a layer
costs today. "own + norm" is one launch. `--programs` tries other grids.

This decides `splitserve.parallel.cuda_group.SMALL_SUMS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from splitserve_kernels.all_reduce import (
    all_reduce,
    all_reduce_add_norm,
    all_reduce_add_norm_reference,
    all_reduce_reference,
)
from splitserve_kernels.norm import add_norm
from splitserve_kernels.peer_memory import MOST_PROGRAMS, PeerMemory
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from benchmarks.kernels.timing import event_us
from benchmarks.machine import describe_machine
from splitserve.parallel.cuda_group import TIMEOUT_S, CudaGroup
from splitserve.parallel.ending import Ending
from splitserve.parallel.peer_sums import open_peer_sums

WIDTH = 4096
SIZES = tuple(kib << 10 for kib in (8, 64, 256, 512))
CALLS, WARM_UPS, REPLAYS = 50, 20, 40
LEAVE_S = 20
NORM: dict[str, Any] = {"kind": "rms", "wide_weight": False}
EPS = 1e-5
# Of bf16. Sums in other orders may round at each rank's part.
ROUNDING = 2**-8

Way = Callable[[], Any]
"""Gives the sum, or the new residual and its norm."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """All ranks' rows of one size, and what a layer adds them to."""

    parts: Tensor
    residual: Tensor
    weight: Tensor

    @classmethod
    def of(cls, ranks: int, size: int, seed: int) -> Rows:
        """The same on every rank for one seed."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda").bfloat16()

        rows = size // WIDTH // torch.bfloat16.itemsize
        return cls(draw(ranks, rows, WIDTH), draw(rows, WIDTH), draw(WIDTH))


def ways(rows: Rows, group: CudaGroup, own: dict[str, PeerMemory]) -> dict[str, Way]:
    """Every way by its name; `own` are blocks of memory by theirs."""
    part, residual, weight = rows.parts[group.rank], rows.residual, rows.weight

    def nccl() -> Way:
        # In place, and over and over: right the first time only.
        scratch = part.clone()

        def call() -> Tensor:
            dist.all_reduce(scratch)
            return scratch

        return call

    def then_norm(reduce: Way) -> Way:
        return lambda: add_norm(residual, reduce(), weight, None, EPS, **NORM)

    found: dict[str, Way] = {
        "torch": lambda: group.all_reduce(part),
        "torch + norm": then_norm(lambda: group.all_reduce(part)),
    }
    for name, peers in own.items():
        found[name] = partial(all_reduce, part, peers)
        found[f"{name} + norm"] = partial(
            all_reduce_add_norm, part, residual, weight, None, EPS, peers, **NORM
        )
    # Last, as graphs of it with launches of ours behind are the least certain to be recorded.
    return found | {"nccl": nccl(), "nccl + norm": then_norm(nccl())}


def check(rows: Rows, found: dict[str, Way]) -> dict[str, float]:
    """Each way's largest error in units of what it may be: 1 is the most."""
    parts = list(rows.parts)
    total = all_reduce_reference(parts)
    added, normed = all_reduce_add_norm_reference(
        parts, rows.residual, rows.weight, None, EPS, **NORM
    )
    errors = {}
    for name, call in found.items():
        out = call()
        pairs = zip(out, (added, normed), strict=True) if isinstance(out, tuple) else [(out, total)]
        most = [
            float(((a.float() - b.float()).abs() / (1 + b.float().abs())).max()) for a, b in pairs
        ]
        errors[name] = max(most) / (len(parts) * ROUNDING)
        if name.startswith("own") and most[0]:  # sums in the order of ranks have the same bits
            errors[name] = float("inf")
    return errors


def eager_us(call: Way) -> float:
    """Microseconds a call that the host launches, among many, on the slowest rank."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    taken = statistics.median(event_us(calls) for _ in range(REPLAYS // 4)) / CALLS
    return slowest(taken)


def slowest(taken: float) -> float:
    """The greatest of all ranks."""
    of_all = torch.tensor(taken, device="cuda")
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return float(of_all)


def replay_us(call: Way) -> float:
    """Microseconds a call in a graph of many, on the slowest rank."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events meanwhile.
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        for _ in range(CALLS):
            call()
    for _ in range(WARM_UPS):
        graph.replay()
    return slowest(statistics.median(event_us(graph.replay) for _ in range(REPLAYS)) / CALLS)


def run_rank(rank: int, ranks: int, store: str, programs: list[int], seed: int, say: Any) -> None:
    """One rank's part; rank 0 says what was found."""
    device = torch.device("cuda", rank)
    group = CudaGroup(
        FileStore(store, ranks), rank, ranks, device, Ending(), one_node=True, small_sums="torch"
    )
    world = dist.group.WORLD
    assert world is not None
    with torch.cuda.stream(torch.cuda.Stream(device)):
        sums = {
            "own" if count == MOST_PROGRAMS else f"own/{count}": open_peer_sums(
                world, device, TIMEOUT_S, programs=count
            )
            for count in programs
        }
        dist.barrier()
        results = []
        for index, size in enumerate(SIZES):
            rows = Rows.of(ranks, size, seed + index)
            own = {name: sum_.peers(rows.residual) for name, sum_ in sums.items()}
            found = ways(rows, group, {k: v for k, v in own.items() if v is not None})
            errors = check(rows, found)
            for name, call in found.items():
                eager, us = eager_us(call), replay_us(call)
                row = {"way": name, "bytes": size, "us": us, "eager_us": eager}
                results.append({**row, "error": errors[name]})
                if rank == 0:
                    times = f"{us:8.2f} us, {eager:8.2f} eager"
                    print(f"{name:<16} {size >> 10:>4} KiB {times}  {errors[name]:.2f}", flush=True)
        torch.cuda.synchronize()
    if rank == 0:
        say.put(results)
    group.close()


def await_results(said: Any, processes: list[Any]) -> list[dict[str, Any]]:
    while True:
        try:
            results: list[dict[str, Any]] = said.get(timeout=1)
            return results
        except queue.Empty:
            if any(process.exitcode for process in processes):
                sys.exit("a rank failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--programs", type=int, nargs="+", default=[MOST_PROGRAMS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.ranks, f"{folder}/store", options.programs, options.seed, said)
        processes = [
            context.Process(target=run_rank, args=(rank, *arguments), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in processes:
            process.start()
        results = await_results(said, processes)
        for process in processes:
            process.join(LEAVE_S)
    if options.json:
        result = {
            "machine": describe_machine(),
            "gpu": torch.cuda.get_device_name(),
            "ranks": options.ranks,
            "triton": triton.__version__,
            "seed": options.seed,
            "calls_in_graph": CALLS,
            "width": WIDTH,
            "results": results,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = [entry for entry in results if not entry["error"] <= 1]
    print(f"{len(results) - len(failed)} of {len(results)} are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
