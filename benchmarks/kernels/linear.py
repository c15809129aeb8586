"""The products of decoding on this GPU: right in every type, then timed beside torch's.

    python benchmarks/kernels/linear.py --json out.json
    python benchmarks/kernels/linear.py --tune --json tuned.json

Every check draws fresh inputs and writes into an output of NaN. Times are medians of replays of a
CUDA graph over copies of a weight that together are several times the L2 cache, so that every
weight comes from memory. The floor is the bytes of weight, input and output over the measured rate
of a large copy; `x floor` is time over floor. `--tune` times many plans a shape and prints the
best, from which `choose` in each kernel's file was filled in.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from splitserve_kernels.small_tiles import TilePlan

from benchmarks.kernels.linear_cases import KINDS, SHAPES, Case, check, checks_of, make_case
from benchmarks.kernels.linear_plans import neighbours, plans
from benchmarks.kernels.timing import copy_bytes_per_s, graph_us
from benchmarks.machine import describe_machine

GPU = torch.device("cuda")
COMPILERS = 14


def time_plan(case: Case, plan: TilePlan | None, *, early: bool = True) -> float:
    calls = [case.call(copy, plan, early=early) for copy in range(len(case.weights))]
    return graph_us(calls)


def precompile(kinds: list[str], shapes: list[str], rows: list[int], *, tuning: bool) -> None:
    """Fill Triton's cache from processes of their own, before this one touches the GPU."""
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=_compile_share, args=(share, kinds, shapes, rows, tuning))
        for share in range(COMPILERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compile_share(
    share: int, kinds: list[str], shapes: list[str], rows: list[int], tuning: bool
) -> None:
    jobs: list[Callable[[], object]] = [
        partial(check, kind, number) for kind in kinds for number in range(checks_of(kind))
    ]
    if tuning:
        jobs += _one_of_each(kinds, shapes, rows)
    for job in jobs[share::COMPILERS]:
        # What fails here fails again, and is reported, where it is checked or timed.
        with contextlib.suppress(Exception):
            job()
    torch.cuda.synchronize()


def tune(kind: str, name: str, m: int, rate: float) -> dict[str, object]:
    """Every plan's time for one shape, and the library's."""
    n, k = SHAPES[name]
    case = make_case(kind, m, n, k, gated=name == "gate_up", copies=None)
    tried: list[tuple[float, bool, TilePlan]] = []

    def attempt(plan: TilePlan, *, early: bool = True) -> None:
        try:
            tried.append((time_plan(case, plan, early=early), early, plan))
        except Exception as error:
            print("failed", kind, name, m, plan, repr(error)[:120])

    for plan in plans(kind, m, n, k, gated=case.gated):
        attempt(plan)
    tried.sort(key=lambda entry: entry[0])
    best = tried[0][2]
    for plan in neighbours(best, integers=kind.startswith("int")):
        attempt(plan)
    attempt(best, early=False)
    tried.sort(key=lambda entry: entry[0])
    library = graph_us([case.library(copy) for copy in range(len(case.weights))])
    floor = case.moved_bytes / rate / 1e6
    print(f"{kind} {name} m={m}: library {library:.1f} floor {floor:.1f}")
    for us, early, plan in tried[:3]:
        print(f"   {us:6.2f} {us / floor:.2f}x {'early' if early else 'late '} {short(plan)}")
    return {
        "kind": kind,
        "shape": name,
        "m": m,
        "library_us": library,
        "floor_us": floor,
        "tried": [(us, early, short(plan)) for us, early, plan in tried],
    }


def short(plan: TilePlan) -> str:
    return " ".join(str(value) for value in vars(plan).values())


def compare(kind: str, name: str, m: int, rate: float) -> dict[str, object]:
    """One row of the table: the plan that `choose` gives, without early launch too."""
    n, k = SHAPES[name]
    case = make_case(kind, m, n, k, gated=name == "gate_up", copies=None)
    floor = case.moved_bytes / rate / 1e6
    library = graph_us([case.library(copy) for copy in range(len(case.weights))])
    entry: dict[str, object] = {
        "kind": kind,
        "shape": name,
        "m": m,
        "floor_us": floor,
        "library_us": library,
        "chosen": case.chosen() is not None,
    }
    if m <= 64:
        entry["kernel_us"] = time_plan(case, None)
        entry["late_us"] = time_plan(case, None, early=False)
    return entry


def show(entry: dict[str, object]) -> str:
    floor = float(str(entry["floor_us"]))
    parts = [f"{entry['kind']:>5} {entry['shape']:>8} m={entry['m']:<3} floor {floor:6.1f}us"]
    for name in ("library_us", "kernel_us", "late_us"):
        if name in entry:
            us = float(str(entry[name]))
            parts.append(f"{name[:-3]} {us:6.1f} {us / floor:4.2f}x")
    return "  ".join(parts) + ("" if entry["chosen"] else "  (library)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256])
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    start = time.monotonic()
    choice = (arguments.kinds, arguments.shapes, arguments.rows)
    precompile(*choice, tuning=arguments.tune)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    properties = torch.cuda.get_device_properties(GPU)
    rate = copy_bytes_per_s() / 1e12
    print(f"{properties.name}: copy {rate:.2f} TB/s, seed {arguments.seed}")
    result: dict[str, object] = {
        "machine": describe_machine(),
        "gpu": properties.name,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "seed": arguments.seed,
        "copy_tb_per_s": rate,
    }
    checks = [check(kind, i) for kind in arguments.kinds for i in range(checks_of(kind))]
    wrong = [check for check in checks if not check["ok"]]
    result["checks"] = checks
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed", *wrong[:8], sep="\n")
    times: list[dict[str, object]] = []
    for kind, name, m in itertools.product(*choice):
        if arguments.tune and m > 64:
            continue
        if arguments.tune:
            times.append(tune(kind, name, m, rate))
        else:
            times.append(compare(kind, name, m, rate))
            print(show(times[-1]))
        sys.stdout.flush()
        result["times"] = times
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


def _one_of_each(
    kinds: list[str], shapes: list[str], rows: list[int]
) -> list[Callable[[], object]]:
    """A small call for each kernel that tuning will need."""
    jobs = {}
    for kind in kinds:
        for name in shapes:
            n, k = SHAPES[name]
            gated = name == "gate_up"
            for m in (m for m in rows if m <= 64):
                for plan in plans(kind, m, n, k, gated=gated):
                    if (kind, gated, plan) not in jobs:
                        small = make_case(kind, m, 1024, 4096, gated=gated, copies=1)
                        jobs[kind, gated, plan] = small.call(0, plan, early=True)
    return list(jobs.values())


if __name__ == "__main__":
    sys.exit(main())
