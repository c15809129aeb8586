"""The products of decoding on this GPU: right in every type, then timed beside torch's.

    python benchmarks/kernels/linear.py --json out.json
    python benchmarks/kernels/linear.py --tune --json tuned.json
    python benchmarks/kernels/linear.py --whole --json whole.json

Every check draws fresh inputs and writes into an output of NaN. Times are medians of replays of a
CUDA graph over copies of a weight that together are several times the L2 cache, so that every
weight comes from memory. The floor is the bytes of weight, input and output over the measured rate
of a large copy; `x floor` is time over floor. `--tune` times many plans a shape and prints the
best, from which `choose` in each kernel's file was filled in. `--whole` sets two ways of bf16 rows
into an fp8 product against each other: through a launch that makes codes of them, and as they are.
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
from splitserve_kernels.fp8_rows import quantize_rows_fp8
from splitserve_kernels.small_linear import gate_reference
from splitserve_kernels.small_linear_fp8 import (
    choose_fp8,
    small_gated_linear_fp8,
    small_linear_fp8,
    small_linear_fp8_reference,
)
from splitserve_kernels.small_tiles import TOLERANCE, TilePlan
from torch import Tensor

from benchmarks.kernels.linear_cases import CHECKS, KINDS, SHAPES, Case, check, checks_of, make_case
from benchmarks.kernels.linear_plans import neighbours, plans
from benchmarks.kernels.timing import copy_bytes_per_s, graph_us
from benchmarks.machine import describe_machine

GPU = torch.device("cuda")
COMPILERS = 14
ROWS = (1, 8, 16, 32, 64, 128, 256)
WHOLE_ROWS = (1, 4, 8, 16, 32, 64)


def time_plan(case: Case, plan: TilePlan | None, *, early: bool = True) -> float:
    calls = [case.call(copy, plan, early=early) for copy in range(len(case.weights))]
    return graph_us(calls)


def precompile(make_jobs: Callable[[], list[Callable[[], object]]]) -> None:
    """Fill Triton's cache from processes of their own, before this one touches the GPU."""
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=_compile_share, args=(share, make_jobs)) for share in range(COMPILERS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _compile_share(share: int, make_jobs: Callable[[], list[Callable[[], object]]]) -> None:
    for job in make_jobs()[share::COMPILERS]:
        # What fails here fails again, and is reported, where it is checked or timed.
        with contextlib.suppress(Exception):
            job()
    torch.cuda.synchronize()


def _jobs(
    kinds: list[str], shapes: list[str], rows: list[int], *, tuning: bool
) -> list[Callable[[], object]]:
    jobs: list[Callable[[], object]] = [
        partial(check, kind, number) for kind in kinds for number in range(checks_of(kind))
    ]
    return jobs + (_one_of_each(kinds, shapes, rows) if tuning else [])


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
    for name in ("library_us", "kernel_us", "late_us", "product_us", "coded_us", "whole_us"):
        if name in entry:
            us = float(str(entry[name]))
            parts.append(f"{name[:-3]} {us:6.1f} {us / floor:4.2f}x")
    return "  ".join(parts) + ("" if entry["chosen"] else "  (library)")


class Whole:
    """An fp8 product of rows that are not codes yet, over copies of its weight."""

    def __init__(self, m: int, n: int, k: int, *, gated: bool, copies: int | None = 1) -> None:
        self.case = make_case("fp8", m, n, k, gated=gated, copies=copies)
        self.weights = [each for each in self.case.weights if isinstance(each, Tensor)]
        # Parts of a row are of different sizes, and some are nothing.
        sizes = torch.logspace(-3, 3, k // 16, device=GPU)[torch.randperm(k // 16, device=GPU)]
        sizes[torch.rand_like(sizes) < 0.1] = 0
        self.x = (torch.randn(m, k, device=GPU) * sizes.repeat_interleave(16)).bfloat16()

    def call(
        self, copy: int, plan: TilePlan | None, *, coded: bool = False, out: Tensor | None = None
    ) -> Tensor:
        """One product, `coded` by a launch before it or not."""
        x, steps = quantize_rows_fp8(self.x) if coded else (self.x, None)
        weight, scales = self.weights[copy], self.case.scales
        if self.case.gated:
            return small_gated_linear_fp8(x, steps, weight, scales, "silu", plan=plan, out=out)
        return small_linear_fp8(x, steps, weight, scales, plan=plan, out=out)

    def us(self, plan: TilePlan | None, *, coded: bool = False) -> float:
        """Microseconds of one."""
        copies = range(len(self.weights))
        return graph_us([partial(self.call, copy, plan, coded=coded) for copy in copies])

    def check(self, plan: TilePlan) -> dict[str, object]:
        """The result over NaN against the reference, and the same bits again."""
        (m, n, k), parts = (self.case.m, self.case.n, self.case.k), 1 + self.case.gated
        out = torch.full((m, n // parts), torch.nan, device=GPU).bfloat16()
        self.call(0, plan, out=out)
        exact = small_linear_fp8_reference(
            self.x, None, self.weights[0], self.case.scales, block_k=plan.block_k
        )
        exact = gate_reference(exact, "silu") if self.case.gated else exact
        error = ((out.float() - exact).norm(dim=1) / exact.norm(dim=1)).nan_to_num(torch.inf).max()
        fits = float(error) <= TOLERANCE[torch.bfloat16] * parts
        same = torch.equal(out, self.call(0, plan))
        return {"shape": (m, n, k), "plan": str(plan), "error": float(error), "ok": fits and same}


def check_whole(number: int) -> dict[str, object]:
    """Sides that no block divides, gates and splits, with a plan of this check's own."""
    (m, n, k), gated, splits, tma = CHECKS[number]
    side = 16 if m <= 16 else 64
    plan = TilePlan(side, 64, 256 if tma else 128, splits, 4, 3, 4, precise_k=128)
    return Whole(m, n, k, gated=gated).check(plan)


def compare_whole(name: str, m: int, rate: float, *, tuning: bool) -> dict[str, object]:
    """Both ways for one shape: the check of its plan, and its time; with `tuning`, other plans'."""
    (n, k), gated = SHAPES[name], name == "gate_up"
    whole = Whole(m, n, k, gated=gated, copies=None)
    chosen = choose_fp8(m, n, k, num_processors=132, gated=gated, coded=False)
    entry: dict[str, object] = whole.check(chosen) if chosen else {"ok": True}
    entry |= {"kind": "whole", "shape": name, "m": m, "chosen": chosen is not None}
    entry["floor_us"] = whole.case.moved_bytes / rate / 1e6
    entry["product_us"] = time_plan(whole.case, None)
    entry["coded_us"] = whole.us(None, coded=True)
    entry["whole_us"] = whole.us(None)
    if tuning:
        tried: list[tuple[float, str]] = []
        for plan in plans("fp8", m, n, k, gated=gated):
            with contextlib.suppress(Exception):  # too much shared memory
                tried.append((whole.us(plan), short(plan)))
        entry["tried"] = sorted(tried)
        print(*(f"   {us:6.2f} {plan}" for us, plan in sorted(tried)[:3]), sep="\n")
    return entry


def _whole_jobs(shapes: list[str], rows: list[int]) -> list[Callable[[], object]]:
    def once(name: str, m: int, *, coded: bool) -> None:
        Whole(m, *SHAPES[name], gated=name == "gate_up").call(0, None, coded=coded)

    choice = itertools.product(shapes, (m for m in rows if m <= 64), (False, True))
    return [
        *(partial(check_whole, number) for number in range(len(CHECKS))),
        *(partial(once, name, m, coded=coded) for name, m, coded in choice),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int)
    arguments = parser.parse_args()
    rows = arguments.rows or list(WHOLE_ROWS if arguments.whole else ROWS)
    torch.manual_seed(arguments.seed)
    start = time.monotonic()
    choice = (arguments.kinds, arguments.shapes, rows)
    if arguments.whole:
        precompile(partial(_whole_jobs, arguments.shapes, rows))
    else:
        precompile(partial(_jobs, *choice, tuning=arguments.tune))
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
    if arguments.whole:
        checks = [check_whole(i) for i in range(len(CHECKS))]
        choice = (["whole"], arguments.shapes, rows)
    else:
        checks = [check(kind, i) for kind in arguments.kinds for i in range(checks_of(kind))]
    wrong = [check for check in checks if not check["ok"]]
    result["checks"] = checks
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed", *wrong[:8], sep="\n")
    times: list[dict[str, object]] = []
    for kind, name, m in itertools.product(*choice):
        if (arguments.tune or arguments.whole) and m > 64:
            continue
        if arguments.whole:
            times.append(compare_whole(name, m, rate, tuning=arguments.tune))
            print(show(times[-1]))
            wrong += [] if times[-1]["ok"] else [times[-1]]
        elif arguments.tune:
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
