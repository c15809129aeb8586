"""The library's large products on this GPU: their rate alone, and when they go on for a while.

    PYTHONPATH=kernels:. python benchmarks/kernels/large_products.py

A GPU that multiplies without a pause is held at its power limit, and its clock falls: what prompts
can reach is the `sustained` rate. `alone` is the best of a few products after a rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

GPU = torch.device("cuda")
SHAPES = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
REST_S, ALONE = 0.3, 6


def product(kind: str, m: int, n: int, k: int) -> Callable[[], object]:
    """One call of the library's on fresh normal numbers."""
    x = torch.randn(m, k, device=GPU, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=GPU, dtype=torch.bfloat16) * 0.02
    out = torch.empty(m, n, device=GPU, dtype=torch.bfloat16)
    if kind == "bf16":
        return lambda: torch.mm(x, weight.t(), out=out)
    codes, weight_codes = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    steps, scales = torch.ones(m, 1, device=GPU), torch.ones(1, n, device=GPU)
    return lambda: torch._scaled_mm(
        codes, weight_codes.t(), steps, scales, out_dtype=torch.bfloat16, out=out
    )


def alone_s(call: Callable[[], object]) -> float:
    """The shortest of a few calls after a rest."""
    call()
    torch.cuda.synchronize()
    time.sleep(REST_S)
    times = []
    for _ in range(ALONE):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return min(times)


def sustained_s(call: Callable[[], object], seconds: float) -> float:
    """A call's time in the last two thirds of so many seconds."""
    began, counted_from, count = time.perf_counter(), 0.0, 0
    while (now := time.perf_counter()) < began + seconds:
        if not counted_from and now > began + seconds / 3:
            counted_from, count = now, 0
        for _ in range(4):
            call()
        torch.cuda.synchronize()
        count += 4
    return (time.perf_counter() - counted_from) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 4096, 2048])
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    for kind in ("bf16", "fp8"):
        for name, (n, k) in SHAPES.items():
            for m in options.rows:
                call, operations = product(kind, m, n, k), 2e-12 * m * n * k
                alone = operations / alone_s(call)
                sustained = operations / sustained_s(call, options.seconds)
                print(f"{kind:>5} {name:>8} {m:>5} rows  alone {alone:5.0f}", end=" ")
                print(f"sustained {sustained:5.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
