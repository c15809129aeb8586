"""The products of experts on this GPU: right in every type, then timed beside torch's grouped one.

    python benchmarks/kernels/experts.py --json out.json

As in `linear.py`: fresh inputs, outputs of NaN, graphs over copies that together are larger than
the L2 cache. Rows are routed at random. The floor counts the weights of experts that have rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from splitserve_kernels.grouped_linear import (
    any_plan,
    grouped_linear,
    grouped_linear_reference,
)
from splitserve_kernels.small_tiles import TOLERANCE, TilePlan
from torch import Tensor

from benchmarks.kernels.timing import copy_bytes_per_s, graph_us
from benchmarks.machine import describe_machine

GPU = torch.device("cuda")
SHAPES = {
    # experts, experts a token, n, k
    "8 of 14336": (8, 2, 28672, 4096),
    "128 of 768": (128, 8, 1536, 2048),
}
TOKENS = (1, 16, 64, 512, 4096)
PLANS = [
    TilePlan(16, 64, 128, num_stages=4),
    TilePlan(16, 128, 128, num_stages=4),
    TilePlan(32, 128, 64, num_stages=5),
    TilePlan(32, 128, 128, num_stages=3),
    TilePlan(64, 128, 128, num_stages=3),
    TilePlan(64, 256, 64, num_warps=8, num_stages=4),
    TilePlan(128, 256, 64, num_warps=8, num_stages=4),
]


def route(tokens: int, experts: int, each: int) -> Tensor:
    """Offsets, (experts + 1,) int32, of `each` experts a token."""
    picks = torch.rand(tokens, experts, device=GPU).topk(each, dim=1).indices
    counts = torch.bincount(picks.flatten(), minlength=experts)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def check(dtype: torch.dtype, tokens: int) -> dict[str, object]:
    offsets = route(tokens, 12, 3)
    rows = tokens * 3
    x = torch.randn(rows + 2, 520, device=GPU).to(dtype)
    weights = torch.randn(12, 200, 520, device=GPU).to(dtype)
    out = torch.full((rows + 2, 200), torch.nan, device=GPU, dtype=dtype)
    grouped_linear(x, weights, offsets, out=out)
    exact = grouped_linear_reference(x, weights, offsets)[:rows]
    errors = ((out[:rows] - exact).norm(dim=1) / exact.norm(dim=1)).nan_to_num(torch.inf)
    ok = float(errors.max()) <= TOLERANCE[dtype] and bool(out[rows:].isnan().all())
    return {"dtype": str(dtype), "tokens": tokens, "error": float(errors.max()), "ok": ok}


def compare(name: str, tokens: int, rate: float, *, tuning: bool) -> dict[str, object]:
    experts, each, n, k = SHAPES[name]
    copies = max(2, (320 << 20) // (experts * n * k * 2))
    offsets = route(tokens, experts, each)
    x = torch.randn(tokens * each, k, device=GPU).bfloat16()
    weights = [torch.randn(experts, n, k, device=GPU).bfloat16() for _ in range(copies)]
    used = int((offsets[1:] > offsets[:-1]).sum())
    floor = (used * n * k * 2 + x.nbytes + 2 * tokens * each * n) / rate / 1e6

    def timed(plan: TilePlan) -> float:
        return graph_us([lambda w=w: grouped_linear(x, w, offsets, plan=plan) for w in weights])

    entry: dict[str, object] = {"shape": name, "tokens": tokens, "floor_us": floor}
    chosen = any_plan(tokens * each, experts, x.dtype)
    entry["kernel_us"] = us = timed(chosen)
    entry["kernel_tflop_per_s"] = 2 * tokens * each * n * k / us / 1e6
    entry["library_us"] = graph_us(
        [lambda w=w: torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:]) for w in weights]
    )
    if tuning:
        tried: list[tuple[float, str]] = []
        for plan in PLANS:
            try:
                tried.append((timed(plan), " ".join(map(str, vars(plan).values()))))
            except Exception as error:
                print("failed", plan, repr(error)[:100])
        entry["tried"] = sorted(tried)
        print("   ", sorted(tried)[:3])
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rate = copy_bytes_per_s() / 1e12
    print(f"{torch.cuda.get_device_name()}: copy {rate:.2f} TB/s, seed {arguments.seed}")
    types = (torch.bfloat16, torch.float16, torch.float32)
    checks = [check(dtype, tokens) for dtype in types for tokens in (1, 40, 300)]
    wrong = [entry for entry in checks if not entry["ok"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed", *wrong, sep="\n")
    times = []
    for name in SHAPES:
        for tokens in TOKENS:
            times.append(compare(name, tokens, rate, tuning=arguments.tune))
            text = {k: round(v, 1) for k, v in times[-1].items() if isinstance(v, float)}
            print(name, tokens, text, flush=True)
    result = {
        "machine": describe_machine(),
        "gpu": torch.cuda.get_device_name(),
        "seed": arguments.seed,
        "copy_tb_per_s": rate,
        "checks": checks,
        "times": times,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
