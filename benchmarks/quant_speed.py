"""Products of codes beside bf16's, for the shapes of a 135M model and two large ones.

    python benchmarks/quant_speed.py --rows 1 16 512 --threads 2

Weights are cycled through so that caches hold none of them, kinds take turns, and each figure is
the 20th percentile of the rounds, in microseconds a product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from splitserve.models.linear import Linear, PackedLinear, PlainLinear
from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8

LAYERS = 30
SMALL = {
    (960, 576): LAYERS,
    (576, 576): LAYERS,
    (3072, 576): LAYERS,
    (576, 1536): LAYERS,
    (49152, 576): 1,
}
LARGE = {(4096, 4096): 0, (14336, 4096): 0}
CYCLE_WEIGHTS = 100_000_000
SECONDS = 1.0


def coded(
    quantize: Callable[[Tensor], QuantizedMatrix], *, rounded: bool = False
) -> Callable[[Tensor], Linear]:
    def make(weight: Tensor) -> Linear:
        matrix = replace(quantize(weight), quantizes_input=rounded)
        return make_quantized_linear(matrix, None, torch.bfloat16, weight.device)

    return make


def dense(weight: Tensor) -> Linear:
    kind = PackedLinear if torch._C._has_mkldnn else PlainLinear
    return kind(weight.bfloat16(), None)


KINDS: dict[str, Callable[[Tensor], Linear]] = {
    "bf16": dense,
    "int8": coded(quantize_int8),
    "int8xint8": coded(quantize_int8, rounded=True),
    "int4": coded(quantize_int4),
    "fp8": coded(quantize_fp8),
}


def measure(shape: tuple[int, int], rows: int) -> dict[str, float]:
    count = max(3, min(40, CYCLE_WEIGHTS // (shape[0] * shape[1])))
    weight = torch.randn(shape)
    x = torch.randn(rows, shape[1]).bfloat16()
    chains = {kind: [make(weight) for _ in range(count)] for kind, make in KINDS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times["bf16"]) < 5:
        for kind, chain in chains.items():
            start = time.perf_counter()
            for product in chain:
                product(x)
            times[kind].append((time.perf_counter() - start) / count)
    return {kind: sorted(taken)[len(taken) // 5] for kind, taken in times.items()}


def line(label: str, figures: dict[str, float], unit: float) -> str:
    parts = [f"{k} {v * unit:9.2f} ({figures['bf16'] / v:4.2f} x)" for k, v in figures.items()]
    return f"{label:24s}" + "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="4096 x 4096 and 14336 x 4096, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for rows in options.rows:
        total = dict.fromkeys(KINDS, 0.0)
        for shape, layers in {**SMALL, **(LARGE if options.large else {})}.items():
            figures = measure(shape, rows)
            print(line(f"{rows} x {shape[0]} x {shape[1]}", figures, 1e6), flush=True)
            for kind, seconds in figures.items():
                total[kind] += layers * seconds
        print(line(f"{rows}, a whole model, ms", total, 1e3), flush=True)


if __name__ == "__main__":
    main()
